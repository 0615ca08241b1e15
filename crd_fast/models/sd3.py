"""Stable Diffusion 3 and 3.5, medium and large (StableDiffusion3Pipeline)."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import StableDiffusion3Pipeline

from crd_fast.models.base import CLIP_TOKENS, JOINT_ATTENTION, states_and_pooled
from crd_fast.models.pipeline import PipelineModel


class SD3Model(PipelineModel):
    """Latents (B, 16, h, w), not packed; time in 0 to 1000; two CLIP encoders and T5, padding included."""

    name = "Stable Diffusion 3"
    pipeline = StableDiffusion3Pipeline
    lora_targets = JOINT_ATTENTION
    text_length = 256
    max_text_length = 512  # beyond which the pipeline refuses
    optional = ("text_encoder_3", "tokenizer_3")
    configs: ClassVar = {
        "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
        "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    }

    def _size_multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def max_size(self) -> int:
        return self.pipe.transformer.config.pos_embed_max_size * self.size_multiple

    def _steps(self, steps: int) -> dict:
        return {"num_inference_steps": steps}  # unlike the other families down to the scheduler's last sigma

    def _encode(self, pipe, prompt: str) -> dict[str, torch.Tensor]:
        states, _, pooled, _ = pipe.encode_prompt(
            [prompt],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"states": states[0], "pooled": pooled[0]}

    def longest_embeddings(self, prompts: int) -> dict[str, torch.Tensor]:
        tokens = CLIP_TOKENS + self.text_length  # CLIP's and T5's, one after the other
        return states_and_pooled(self.transformer.config, prompts, tokens, self.dtype)

    def velocity(self, x, sigma, embeddings):
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=embeddings["states"].to(self.dtype),
            pooled_projections=embeddings["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
