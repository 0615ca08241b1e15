"""Z-Image and Z-Image-Turbo (ZImagePipeline)."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from crd_fast.models.base import padded
from crd_fast.models.pipeline import PipelineModel
from crd_fast.models.prompt_reader import Reading, before_prompt


class ZImageModel(PipelineModel):
    """Latents (B, 16, h, w), which the network takes as a list; captions of Qwen3, each of its own length.

    The network's time runs from noise at 0 to the image at 1, and it predicts the negative velocity. The
    pipeline counts guidance from 0, cond + g (cond - uncond); everywhere here it is g + 1.
    """

    name = "Z-Image"
    pipeline = ZImagePipeline
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    text_length = 512
    joins_rows = True
    configs: ClassVar = {
        "Tongyi-MAI/Z-Image": "z-image",
        "Tongyi-MAI/Z-Image-Turbo": "z-image",
    }  # of one shape

    def max_size(self) -> int:
        return min(self.pipe.transformer.config.axes_lens[1:]) * self.size_multiple

    @property
    def max_text_length(self) -> int:
        """In whole pads of captions; behind them comes the image's first position."""
        return (self.pipe.transformer.config.axes_lens[0] - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF

    def _reading(self, tokenizer, tokens: int) -> Reading:
        before = before_prompt(tokenizer, enable_thinking=True)
        return Reading(tokenizer, lambda prompt: before + prompt, tokens)

    def _encode(self, pipe, prompt: str) -> dict[str, torch.Tensor]:
        (states,), _ = pipe.encode_prompt(
            [prompt],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"states": padded(states, self.text_length), "length": torch.tensor(len(states))}

    def longest_embeddings(self, prompts: int) -> dict[str, torch.Tensor]:
        length = torch.full((prompts,), self.text_length)
        return super().longest_embeddings(prompts) | {"length": length}

    def velocity(self, x, sigma, embeddings):
        states = embeddings["states"].to(self.dtype)
        captions = [state[:length] for state, length in zip(states, embeddings["length"].tolist())]
        images = list(x.to(self.dtype).unsqueeze(2).unbind(0))
        time = (1000 - sigma * 1000) / 1000  # to the bit as the pipeline has it
        predicted = self.transformer(images, time, captions, return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)
