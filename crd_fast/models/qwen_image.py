"""Qwen-Image (QwenImagePipeline)."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import QwenImagePipeline

from crd_fast.models.base import JOINT_ATTENTION, padded
from crd_fast.models.pipeline import PipelineModel
from crd_fast.models.prompt_reader import Reading


class QwenImageModel(PipelineModel):
    """Latents (B, 16, h, w), packed 2 x 2 into tokens; time in 0 to 1; states of Qwen2.5-VL with a mask.

    Guidance in the rollout keeps each token's norm, as the pipeline has it. The anchor of the loss is the
    plain guided velocity.
    """

    name = "Qwen-Image"
    pipeline = QwenImagePipeline
    lora_targets = JOINT_ATTENTION
    text_length = 512
    max_text_length = 1024  # beyond which the pipeline refuses
    configs: ClassVar = {"Qwen/Qwen-Image": "qwen-image"}
    unquantized = ("transformer_blocks.0.img_mod",)  # as published 4-bit checkpoints have it

    def _latent(self, height: int, width: int) -> tuple[int, int, int]:
        scale = self.pipe.vae_scale_factor
        return (self.pipe.vae.config.z_dim, height // scale, width // scale)

    def _reading(self, tokenizer, tokens: int) -> Reading:
        before = self.pipe.prompt_template_encode.partition("{}")[0]
        dropped = self.pipe.prompt_template_encode_start_idx  # of the encoded template, at its beginning
        read = dropped + min(tokens, self.pipe.tokenizer_max_length)
        return Reading(tokenizer, lambda prompt: before + prompt, read)

    def _encode(self, pipe, prompt: str) -> dict[str, torch.Tensor]:
        states, _ = pipe.encode_prompt([prompt], device=self.device, max_sequence_length=self.text_length)
        return {"states": padded(states[0], self.text_length), "length": torch.tensor(states.shape[1])}

    def longest_embeddings(self, prompts: int) -> dict[str, torch.Tensor]:
        length = torch.full((prompts,), self.text_length)
        return super().longest_embeddings(prompts) | {"length": length}

    def velocity(self, x, sigma, embeddings):
        batch, _, height, width = x.shape
        scale, lengths = self.pipe.vae_scale_factor, embeddings["length"]
        longest = int(lengths.max())
        mask = torch.arange(longest, device=x.device) < lengths[:, None]
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch,), self.config.guidance_embedding, device=x.device)
        tokens = self.transformer(
            hidden_states=self._pack(x.to(self.dtype)),
            timestep=self._time(sigma),
            guidance=guidance,
            encoder_hidden_states=embeddings["states"][:, :longest].to(self.dtype),
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(tokens, height * scale, width * scale, scale)[:, :, 0]

    def guide(self, conditional, unconditional, guidance_scale: float) -> torch.Tensor:
        guided = super().guide(conditional, unconditional, guidance_scale)
        norm = self._token_norm(conditional.float()) / self._token_norm(guided)
        return guided * norm.repeat_interleave(2, -2).repeat_interleave(2, -1)

    def _token_norm(self, velocity: torch.Tensor) -> torch.Tensor:
        """(B, 1, h / 2, w / 2) of (B, C, h, w)."""
        height, width = velocity.shape[-2:]
        return self._pack(velocity).norm(dim=-1).view(-1, 1, height // 2, width // 2)

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        return self.pipe._pack_latents(x, *x.shape)

    def _to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents * std + mean).unsqueeze(2)

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        return super()._pixels(images[:, :, 0])
