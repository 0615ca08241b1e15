"""What the trainer asks of a flow model, where most models answer alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from crd_fast.models.checkpointing import enable_checkpointing
from crd_fast.models.norms import keep_dtypes
from crd_fast.models.streaming import Streaming
from crd_fast.schema import ModelConfig
from crd_fast.sizes import Resolution

if TYPE_CHECKING:
    from crd_fast.models.prompt_reader import PromptReader

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


CLIP_TOKENS = 77  # that a CLIP text encoder reads of a prompt


class FlowModel(ABC):
    """A flow model as the trainer sees it.

    name: for people to read, and part of what a checkpoint must match; lora_targets: the layers that are
    adapted by default; lora_loader: diffusers' mixin that writes their files; transformer: the network that
    is trained; device: where it runs.
    streaming: where the transformer's blocks are kept on the host. prompt_reader: how much of prompts the
    text encoders read; None where `unreadable` names a prompt that does not fit.

    And for a plan, which loads nothing: `longest_embeddings(prompts)`, `text_encoders()`, `configs`.
    """

    name: str
    lora_targets: tuple[str, ...]
    lora_loader: Any
    transformer: Any
    streaming: Streaming | None = None
    prompt_reader: PromptReader | None = None
    configs: ClassVar[dict[str, str]] = {}  # hub ids: folder in models/configs that a plan finds there

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the network, or in its weights: nothing is guided away from."""
        return False

    def place(self, network, config: ModelConfig, device: torch.device, checkpointing: float) -> None:
        """The transformer goes to the device, or its blocks are streamed there, or sharding will bring it."""
        keep_dtypes(network)
        if config.streaming:
            self.streaming = Streaming(network, device)
        elif config.sharding == "none":
            network.to(device)
        if checkpointing:
            enable_checkpointing(network, checkpointing)

    @abstractmethod
    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """(C, h, w) of one sample for pictures of this size. UserError where that does not fit."""

    def unreadable(self, prompts: Iterable[str]) -> tuple[str, str] | None:
        """The first prompt that the model refuses, and why; None where it takes them all."""
        return None

    def encode(  # noqa: B027
        self,
        prompts: Iterable[str],
        ahead: Iterable[str] = (),
        tracked: Callable[[list[str]], Iterable[str]] = iter,
    ) -> None:
        """Sees to it that `encode_prompts` has these prompts at hand; nothing where it encodes at once.

        ahead: what will be needed after them, encoded too as far as the cache has room, where there is
        anything to do at all. tracked: goes through what is encoded, and may count.
        """

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of P prompts, each tensor with a first axis of P. Negative ones are marked."""

    @abstractmethod
    def sigmas(self, steps: int, resolution: Resolution) -> torch.Tensor:
        """The noise levels of the model's own schedule: (steps + 1,) float32, from 1 to 0."""

    @abstractmethod
    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, embeddings: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """d x / d sigma. x: (B, C, h, w) float32; sigma: (B,); embeddings with a first axis of B."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, height, width, 3), float32 in [0, 1], of latents (B, C, h, w)."""

    @abstractmethod
    def longest_embeddings(self, prompts: int) -> dict[str, torch.Tensor]:
        """As `encode_prompts` returns for prompts of the greatest length, for a plan.

        What `velocity` reads numbers of, lengths and masks, is real; of the rest only shape and dtype count,
        and it is on the meta device.
        """

    def text_encoders(self) -> dict[str, tuple[str, int]]:
        """The encoders that run on the device, by folder: class of transformers, how many tokens it reads."""
        return {}

    def guide(self, conditional, unconditional, guidance_scale: float) -> torch.Tensor:
        """The guided velocity of the rollout: uncond + w (cond - uncond), float32."""
        return torch.lerp(unconditional.float(), conditional.float(), guidance_scale)


def states_and_pooled(
    config: Mapping[str, Any], prompts: int, tokens: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Text states and, where the transformer takes it, the pooled state, on the meta device.

    config: the transformer's, which says under one of several names how wide they are.
    """
    width = next(
        config[key] for key in ("joint_attention_dim", "caption_channels", "cap_feat_dim") if key in config
    )
    shapes: dict[str, tuple[int, ...]] = {"states": (prompts, tokens, width)}
    if "pooled_projection_dim" in config:
        shapes["pooled"] = (prompts, config["pooled_projection_dim"])
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}


def padded(states: torch.Tensor, length: int) -> torch.Tensor:
    """(L, D) with zeros up to (length, D)."""
    return torch.nn.functional.pad(states[:length], (0, 0, 0, max(length - len(states), 0)))
