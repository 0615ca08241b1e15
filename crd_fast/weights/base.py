"""What holds the four sets of weights of one network, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from crd_fast.ranks import Ranks

if TYPE_CHECKING:
    from diffusers import ModelMixin


class Saved(Protocol):
    """What a checkpoint takes of weights: this rank's, or those of all ranks together."""

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that changes during training, by `set/parameter`."""

    def save_policy(self, folder: Path, name: str = "policy") -> None:
        """The trained weights, or a snapshot of them, in the formats of the libraries that load them."""


class OptimizerState(Protocol):
    """What a checkpoint takes of an optimizer, and gives back to it."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class Weights(ABC):
    """`policy` is trained, `old`, `sampler` and, if there is one, `ema` are snapshots of it, `reference` is
    the pretrained network.

    network: has the policy's weights, but within `use` and `use_rows`.
    sharded: each rank has parts of all tensors, so all ranks take part in every forward and none may be left
    out.
    """

    network: ModelMixin
    sharded = False

    @abstractmethod
    def trained(self) -> list[torch.nn.Parameter]:
        """The policy's parameters, those of this rank. In the same order every time."""

    @abstractmethod
    def use(self, name: str) -> AbstractContextManager[None]:
        """Within this context the network has the weights of `name`, afterwards those of the policy.

        Also where memory runs out while they are switched: no tensor of the policy has changed then.
        """

    def use_rows(self, names: list[str]) -> AbstractContextManager[None]:
        """Within this context each row of a batch has the weights of its name. Without gradient."""
        raise NotImplementedError(f"{type(self).__name__}: one set of weights for all rows of a batch")

    def start_from(self, file: Path) -> None:
        """Policy and snapshots become the LoRA in a file."""
        raise NotImplementedError(f"{type(self).__name__}: no adapters")

    def stepped(self) -> None:  # noqa: B027
        """To be called after each optimizer step, of which torch may count no write."""

    @abstractmethod
    def is_policy(self, name: str) -> bool:
        """Whether a snapshot, as the network would have it, is equal to the policy, in every tensor."""

    @abstractmethod
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * policy."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that changes during training, by `set/parameter`."""

    @abstractmethod
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Copies what `state` returned. Raises UserError, and copies nothing, where that does not match."""

    @abstractmethod
    def save_policy(self, folder: Path, name: str = "policy") -> None:
        """The trained weights, or a snapshot of them, in the formats of the libraries that load them."""

    def become(self, name: str) -> None:
        """The policy becomes what a snapshot is, for use without training."""
        state = self.state()
        policy = (key for key in state if key.startswith("policy/"))
        self.load_state(
            state | {key: state[f"{name}/{key.removeprefix('policy/')}"].clone() for key in policy}
        )

    def host_tensors(self) -> list[torch.Tensor]:
        """The tensors in pinned host memory."""
        return []

    def finish_gradients(self, ranks: Ranks, largest: float) -> float:
        """The gradients' mean over the ranks, shortened to the norm `largest`. Returns their norm before."""
        ranks.average_gradients(self.trained())
        return ranks.clip_gradients(self.trained(), largest, parts=False)

    def gathered(
        self, optimizer: torch.optim.Optimizer, ranks: Ranks
    ) -> tuple[Saved | None, OptimizerState | None]:
        """What `checkpoint.save` takes, on the main rank; elsewhere there may be none. All ranks call it."""
        return self, optimizer

    def resuming(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """The optimizer as what `gathered` returned for it is loaded."""
        return optimizer
