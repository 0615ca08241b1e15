"""FLUX.2-klein (Flux2KleinPipeline)."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from crd_fast.models.base import JOINT_ATTENTION
from crd_fast.models.pipeline import PipelineModel
from crd_fast.models.prompt_reader import Reading, before_prompt
from crd_fast.sizes import Resolution


class Flux2KleinModel(PipelineModel):
    """Latents (B, 128, h, w), four of the VAE's to one, normalized by the VAE's batch norm; time in 0 to 1.

    The text states are three layers of Qwen3 side by side, padding included.
    """

    name = "FLUX.2-klein"
    pipeline = Flux2KleinPipeline
    heeds_flow_sigmas = True
    text_length = 512
    configs: ClassVar = {
        "black-forest-labs/FLUX.2-klein-4B": "flux.2-klein-4b",
        "black-forest-labs/FLUX.2-klein-base-4B": "flux.2-klein-4b",
    }

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        # a block with one stream has its projections in one layer with those of the MLP
        singles = range(self.transformer.config.num_single_layers)
        outputs = (f"single_transformer_blocks.{i}.attn.to_out" for i in singles)
        return (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", *outputs)

    def _latent(self, height: int, width: int) -> tuple[int, int, int]:
        channels = 4 * self.pipe.vae.config.latent_channels
        return (channels, height // self.size_multiple, width // self.size_multiple)

    def _shift(self, steps: int, resolution: Resolution) -> float:
        return compute_empirical_mu(self._tokens(resolution), steps)

    def _reading(self, tokenizer, tokens: int) -> Reading:
        before = before_prompt(tokenizer, enable_thinking=False)
        return Reading(tokenizer, lambda prompt: before + prompt, tokens)

    def _encode(self, pipe, prompt: str) -> dict[str, torch.Tensor]:
        states, _ = pipe.encode_prompt([prompt], device=self.device, max_sequence_length=self.text_length)
        return {"states": states[0]}

    def velocity(self, x, sigma, embeddings):
        states = embeddings["states"].to(self.dtype)
        tokens = self.transformer(
            hidden_states=self.pipe._pack_latents(x.to(self.dtype)),
            timestep=self._time(sigma),
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=self.pipe._prepare_text_ids(states).to(x.device),
            img_ids=self.pipe._prepare_latent_ids(x).to(x.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(x.shape)

    def _to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        std = torch.sqrt(variance + vae.config.batch_norm_eps)
        return self.pipe._unpatchify_latents(latents * std + mean)
