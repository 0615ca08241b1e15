"""What the trainer asks of a flow model, where most models answer alike."""

from __future__ import annotations

import torch

from crd_fast.config import ModelConfig
from crd_fast.models.streaming import Streaming

# The attention projections of a block with an image and a text stream.
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class FlowModel:
    """A flow model as the trainer sees it. `BuiltinModel` and `PipelineModel` say what the rest is.

    name, lora_targets; transformer: the network that is trained; device: where it runs.
    `latent_shape(resolution)`, `encode_prompts(prompts)`, `sigmas(steps, resolution)`,
    `velocity(x, sigma, embeddings)`, `decode(latents)`, and for what leaves as a LoRA `lora_loader`.
    streaming: where the transformer's blocks are kept on the host.
    """

    streaming: Streaming | None = None

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def place(self, network, config: ModelConfig, device: torch.device, checkpointing: bool) -> None:
        """The transformer goes to the device, or its blocks are streamed there, or sharding will bring it."""
        if config.streaming:
            self.streaming = Streaming(network, device)
        elif config.sharding == "none":
            network.to(device)
        if checkpointing:
            network.enable_gradient_checkpointing()

    def guide(self, conditional, unconditional, guidance_scale: float) -> torch.Tensor:
        """The guided velocity of the rollout: uncond + w (cond - uncond), float32."""
        return torch.lerp(unconditional.float(), conditional.float(), guidance_scale)
