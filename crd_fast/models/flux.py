"""FLUX.1-dev and FLUX.1-schnell (FluxPipeline)."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import FluxPipeline

from crd_fast.models.base import JOINT_ATTENTION
from crd_fast.models.pipeline import PipelineModel


class FluxModel(PipelineModel):
    """Latents (B, 16, h, w), packed 2 x 2 into tokens; time in 0 to 1; the pooled CLIP state and T5's tokens.

    FLUX.1-dev has guidance distilled into it: its strength is an input, `model.guidance_embedding`, the same
    for the policy and the reference. `guidance_scale` is guidance by the empty prompt on top of that.
    """

    name = "FLUX.1"
    pipeline = FluxPipeline
    lora_targets = JOINT_ATTENTION
    heeds_flow_sigmas = True
    text_length = 512
    max_text_length = 512  # beyond which the pipeline refuses
    configs: ClassVar = {  # of one shape
        "black-forest-labs/FLUX.1-dev": "flux.1-dev",
        "black-forest-labs/FLUX.1-schnell": "flux.1-dev",
    }

    def _encode(self, pipe, prompt: str) -> dict[str, torch.Tensor]:
        states, pooled, _ = pipe.encode_prompt(
            [prompt], device=self.device, max_sequence_length=self.text_length
        )
        return {"states": states[0], "pooled": pooled[0]}

    def velocity(self, x, sigma, embeddings):
        batch, channels, height, width = x.shape
        scale, states = self.pipe.vae_scale_factor, embeddings["states"]
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch,), self.config.guidance_embedding, device=x.device)
        tokens = self.transformer(
            hidden_states=self.pipe._pack_latents(x.to(self.dtype), batch, channels, height, width),
            timestep=self._time(sigma),
            guidance=guidance,
            pooled_projections=embeddings["pooled"].to(self.dtype),
            encoder_hidden_states=states.to(self.dtype),
            txt_ids=torch.zeros(states.shape[1], 3, device=x.device),
            img_ids=self.pipe._prepare_latent_image_ids(
                batch, height // 2, width // 2, x.device, torch.float32
            ),
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(tokens, height * scale, width * scale, scale)
