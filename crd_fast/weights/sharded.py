"""Every weight cut over the processes (FSDP2), for full fine-tuning of what one GPU does not hold.

Each rank has a part of every parameter's rows, and of its gradient, snapshots and optimizer state. A block's
whole weights are gathered for its forward and its backward and freed after each; so every forward and
backward is a meeting of all ranks, and all must run equally many. Between them a rank's parts are ordinary
parameters: snapshots, optimizers and the norm of the gradient work on these, and what is written to them the
next forward gathers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from crd_fast.errors import UserError
from crd_fast.models.streaming import repeated_blocks
from crd_fast.ranks import Ranks
from crd_fast.weights import checkpoint
from crd_fast.weights.full import FullWeights, HostWeights
from crd_fast.weights.sets import SNAPSHOTS

if TYPE_CHECKING:
    from diffusers import ModelMixin

SPARE_BYTES = 1 << 24  # beside the weights, for exchanging them


class _Parts(FullWeights):
    """What both kinds of weights below have in common: the policy is this rank's parts."""

    sharded = True

    def __init__(self, network: ModelMixin, snapshots: Sequence[str] = SNAPSHOTS):
        self.kind: Any = type(network)  # fully_shard puts a class of its own in its place
        network.requires_grad_(True)
        shard(network)
        self._whole: dict[str, Any] = dict(network.named_parameters())  # each a DTensor
        parts = {name: parameter.detach().to_local() for name, parameter in self._whole.items()}
        # a parameter of fewer rows than ranks has none on the last ones
        policy = {name: torch.nn.Parameter(part) for name, part in parts.items() if part.numel()}
        super().__init__(network, snapshots, policy)

    def finish_gradients(self, ranks: Ranks, largest: float) -> float:
        """Takes the parts of the gradients, of which the backward pass left the mean over the ranks."""
        self.take_gradients()
        return ranks.clip_gradients(self.trained(), largest, parts=True)

    def take_gradients(self) -> None:
        """Moves the gradients, which the backward pass has averaged over the ranks, to the parts."""
        for name, parameter in self._whole.items():
            if name in self._policy and parameter.grad is not None:
                self._policy[name].grad = parameter.grad.to_local()
            parameter.grad = None

    def is_policy(self, name: str) -> bool:
        """Whether a snapshot is equal to the policy on every rank; all of them call it and hear the same."""
        device = next(iter(self._whole.values())).device
        same = torch.tensor(super().is_policy(name), dtype=torch.uint8, device=device)
        dist.all_reduce(same, dist.ReduceOp.MIN)
        return bool(same)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """This rank's parts of what `WholeWeights.state` returned."""
        rank, count = dist.get_rank(), dist.get_world_size()
        chunks = {key: value.chunk(count) for key, value in state.items()}
        super().load_state({key: parts[rank] for key, parts in chunks.items() if rank < len(parts)})

    def gathered(self, optimizer: torch.optim.Optimizer, ranks: Ranks):
        """The weights and the optimizers of all ranks, on the main one; elsewhere None twice."""
        form, tensors = checkpoint.flatten(optimizer.state_dict())
        forms, of_optimizers = ranks.all(form), ranks.collect(tensors)
        of_weights = ranks.collect(self.state())
        if not ranks.main:
            return None, None
        states = [checkpoint.unflatten(*of_rank) for of_rank in zip(forms, of_optimizers)]
        return WholeWeights(self, of_weights), OptimizersOfRanks(optimizer, states)

    def resuming(self, optimizer: torch.optim.Optimizer) -> OptimizersOfRanks:
        return OptimizersOfRanks(optimizer)


class ShardedWeights(_Parts):
    """As FullWeights, on parts, whose memory is FSDP's: to use a set is to exchange contents."""

    def __init__(self, network: ModelMixin, snapshots: Sequence[str] = SNAPSHOTS):
        super().__init__(network, snapshots)
        # made once, so that nothing has to be found room for between the first tensor and the last
        largest = max(parameter.nbytes for parameter in self.trained())
        self._spare = self.trained()[0].new_empty(min(largest, SPARE_BYTES), dtype=torch.uint8)

    def _pairs(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Bytes, in pieces that the spare ones hold."""
        for pair in super()._pairs(name):
            parts = (tensor.detach().view(-1).view(torch.uint8) for tensor in pair)
            yield from zip(*(part.split(SPARE_BYTES) for part in parts))

    @torch.no_grad()
    def _exchange(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        kept = self._spare[: len(parameter)].copy_(parameter)
        try:
            parameter.copy_(value)
            value.copy_(kept)
        except BaseException:
            parameter.copy_(kept)
            raise


class ShardedHostWeights(_Parts, HostWeights):
    """As HostWeights, on parts."""


def shard(network: torch.nn.Module) -> None:
    """Cuts the network's parameters over all ranks, block by block, each on its way to the device."""
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for module in (*repeated_blocks(network), network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


class WholeWeights:
    """The weights of all ranks on the host of the main one, as a checkpoint takes them."""

    def __init__(self, weights: _Parts, parts: list[dict[str, torch.Tensor]]):
        self._kind, self._network = weights.kind, weights.network
        self._state = {
            key: torch.cat([of_rank.pop(key) for of_rank in parts if key in of_rank])
            for key in list(parts[0])
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that changes during training, by `set/parameter`."""
        return self._state

    def save_policy(self, folder: Path, name: str = "policy") -> None:
        """The trained network, as diffusers saves and loads it."""
        with torch.device("meta"):
            network = self._kind.from_config(self._network.config)
        tensors = dict(self._network.state_dict())  # with buffers, which are whole
        tensors |= {
            key: self._state[f"{name}/{key}"].to(parameter.dtype)
            for key, parameter in self._network.named_parameters()
        }
        network.load_state_dict(tensors, assign=True)
        network.save_pretrained(folder / "transformer")


class OptimizersOfRanks:
    """The optimizers of all ranks as one with a list of their states. `states`: those, to be saved."""

    def __init__(self, optimizer: torch.optim.Optimizer, states: list[Any] | None = None):
        self._optimizer, self._states = optimizer, states

    def state_dict(self) -> list[Any] | None:
        return self._states

    def load_state_dict(self, states: list[Any]) -> None:
        self._optimizer.load_state_dict(states[dist.get_rank()])


def check_resumes(state: dict, ranks: int, source: Path) -> None:
    """Raises UserError if the optimizer's state is in the parts of another number of processes."""
    if state["processes"] != ranks:
        raise UserError(
            f"{source}: model.sharding fsdp: made by {state['processes']} processes and goes on with as "
            f"many, got {ranks}"
        )
