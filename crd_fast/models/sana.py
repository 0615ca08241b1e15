"""Sana (SanaPipeline)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

from crd_fast.errors import UserError
from crd_fast.models import negative
from crd_fast.models.pipeline import PipelineModel
from crd_fast.models.prompt_reader import Reading


class SanaModel(PipelineModel):
    """Latents (B, 32, h, w) at a 32nd of the image's side; time in 0 to 1000; Gemma's states with a mask.

    Published pipelines come with a second-order solver; here its flow schedule is walked by Euler steps,
    which is that solver at order 1. Prompts are encoded behind the pipeline's instruction, the empty and
    negative ones without it.
    """

    name = "Sana"
    pipeline = SanaPipeline
    lora_targets = tuple(
        f"{attention}.{layer}"
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )
    text_length = 300
    configs: ClassVar = {
        "Efficient-Large-Model/Sana_1600M_512px_diffusers": "sana-1.6b",
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana-1.6b",
    }

    def load(self, checkpointing: float, quantize: Callable[..., None] | None = None) -> None:
        super().load(checkpointing, quantize)
        for module in self.transformer.modules():
            if isinstance(module, Attention) and isinstance(module.processor, SanaLinearAttnProcessor2_0):
                module.set_processor(LinearAttention())

    def _size_multiple(self) -> int:
        return self.pipe.vae_scale_factor

    def _scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        own = self.component_class("scheduler").from_pretrained(self.folder, subfolder="scheduler")
        if isinstance(own, FlowMatchEulerDiscreteScheduler):
            return own
        if not own.config.get("use_flow_sigmas"):
            raise UserError(
                f"{self.folder / 'scheduler'}: expected a flow schedule, got {type(own).__name__}"
            )
        return FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift)

    def _steps(self, steps: int) -> dict:
        if self.index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler":
            return {"num_inference_steps": steps}
        return super()._steps(steps)  # within 0.1 % those of the solver, which begins at 0.999

    def _instruction(self) -> list[str]:
        """That the pipeline puts before every prompt but the empty one."""
        return inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default

    def _reading(self, tokenizer, tokens: int) -> Reading:
        before = "\n".join(self._instruction())
        # the first and the last of as many tokens as are wanted, the instruction's first and last among them
        read = len(tokenizer.encode(before)) + tokens - 2
        return Reading(tokenizer, lambda prompt: before + self.pipe._text_preprocessing(prompt)[0], read)

    def _as_encoded(self, prompt: str) -> str:
        return prompt

    def _encode(self, pipe, prompt: str) -> dict[str, torch.Tensor]:
        instructed = bool(prompt) and not negative.is_marked(prompt)
        states, mask, _, _ = pipe.encode_prompt(
            [negative.unmarked(prompt)],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_length,
            complex_human_instruction=self._instruction() if instructed else None,
        )
        if mask[0].any():  # attention gives what is masked a weight of exactly 0, unless all of it is
            states = states.masked_fill(mask[..., None] == 0, 0)
        return {"states": states[0], "mask": mask[0]}

    def longest_embeddings(self, prompts: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(prompts, self.text_length, dtype=torch.int64)
        return super().longest_embeddings(prompts) | {"mask": mask}

    def velocity(self, x, sigma, embeddings):
        config = self.transformer.config
        predicted = self.transformer(
            x.to(self.dtype),
            encoder_hidden_states=embeddings["states"].to(self.dtype),
            encoder_attention_mask=embeddings["mask"],
            timestep=sigma * 1000 * config.timestep_scale,
            return_dict=False,
        )[0]
        return predicted[:, : config.in_channels]  # the rest, if any, is a learned variance

    def _to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.pipe.vae.config.scaling_factor


class LinearAttention(SanaLinearAttnProcessor2_0):
    """relu(q) (relu(k)^T v) / relu(q) sum(relu(k)), in float32 under autocast too, as the pipeline has it.

    Autocast would narrow both products, whose sums run over all tokens, to half precision.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        x = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(x), attn.to_v(x)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        # (B, heads, channels of a head, tokens)
        query, key, value = (t.transpose(1, 2).unflatten(1, (attn.heads, -1)) for t in (query, key, value))
        with torch.autocast(x.device.type, enabled=False):
            value = F.pad(value.float(), (0, 0, 0, 1), value=1.0)  # the row of ones sums the keys
            sums = (value @ F.relu(key).float().transpose(2, 3)) @ F.relu(query).float()
            result = sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)
        result = result.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](result))
