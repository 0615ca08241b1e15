"""Full fine-tuning: policy, snapshots and reference as whole copies of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crd_fast.errors import UserError
from crd_fast.models.streaming import Pinned
from crd_fast.weights.base import Weights
from crd_fast.weights.sets import SNAPSHOTS, blend, equal, joined, load

if TYPE_CHECKING:
    from diffusers import ModelMixin

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class FullWeights(Weights):
    """All weights of the network are trained; snapshots and reference are copies to be swapped in.

    snapshots: their names; policy: what is trained, by name, where it is not the network's parameters
    themselves.
    """

    def __init__(
        self,
        network: ModelMixin,
        snapshots: Sequence[str] = SNAPSHOTS,
        policy: dict[str, torch.nn.Parameter] | None = None,
    ):
        self.network, self._snapshots = network, tuple(snapshots)
        network.requires_grad_(True)
        self._policy = policy or dict(network.named_parameters())
        self._sets: dict[str, Mapping[str, torch.Tensor]] = {"policy": self._policy}
        self._add_copies(self._policy)

    def _add_copies(self, policy: dict[str, torch.nn.Parameter]) -> None:
        for name in (*self._snapshots, "reference"):
            self._sets[name] = {key: parameter.detach().clone() for key, parameter in policy.items()}

    def trained(self) -> list[torch.nn.Parameter]:
        return list(self._policy.values())

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Within this context the network has the weights of `name`, afterwards those of the policy.

        Also where memory runs out while they are switched: no tensor of the policy has changed then. Raises
        UserError where it runs out again while they are switched back.
        """
        if name == "policy":
            yield
            return
        with ExitStack() as back:
            self._put(name, back)
            yield

    def is_policy(self, name: str) -> bool:
        """Whether a snapshot, as the network would have it, is equal to the policy, in every tensor."""
        return equal(self._sets[name].values(), self.trained())

    def _put(self, name: str, back: ExitStack) -> None:
        """Policy and set change places. back: what it is given undoes that."""
        for pair in self._pairs(name):
            self._exchange(*pair)
            back.callback(surely, self._exchange, *pair)

    def _pairs(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What changes places: each parameter with its tensor in the set."""
        return zip(self.trained(), self._sets[name].values())

    def _exchange(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Both or, where it fails, none of them; nothing is copied."""
        parameter.data, value.data = value.data, parameter.data

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * policy."""
        blend(self._sets[name].values(), self.trained(), decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that changes during training, by `set/parameter`."""
        return joined({name: self._sets[name] for name in ("policy", *self._snapshots)})

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        load({name: self._sets[name] for name in ("policy", *self._snapshots)}, state)

    def save_policy(self, folder: Path, name: str = "policy") -> None:
        """The trained network, as diffusers saves and loads it."""
        with self.use(name):
            self.network.save_pretrained(folder / "transformer")


class HostWeights(FullWeights):
    """As FullWeights, with one set of weights on the device and copies of all on the host, pinned for a GPU.

    To use a set is to copy it over the policy, and the policy back. Snapshots are float32 whatever the
    network is: a blend with decay 0.999 would be lost in bfloat16, and a float32 copy of bfloat16 rounds back
    exactly.

    The policy is copied to the host once after each change, not at each switch. That it changed is known from
    `stepped`, from torch's count of writes, and for those who write past torch (through `.data`, or as
    bitsandbytes does) from a sum of each tensor's bits, which the device finds out in a fraction of the time
    that a copy takes.
    """

    _written: int | None = None  # what `_writes` and `_sums` were of the policy that is on the host
    _summed: torch.Tensor

    def _add_copies(self, policy: dict[str, torch.nn.Parameter]) -> None:
        pinned = Pinned() if all(value.is_cuda for value in policy.values()) else None

        def on_host(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            value = value.detach()
            return value.to("cpu", dtype, copy=True) if pinned is None else pinned.copy(value, dtype=dtype)

        for name in self._snapshots:
            self._sets[name] = {key: on_host(value, torch.float32) for key, value in policy.items()}
        for name in ("reference", "policy on the host"):
            self._sets[name] = {key: on_host(value, value.dtype) for key, value in policy.items()}

    def host_tensors(self) -> list[torch.Tensor]:
        return [value for name, s in self._sets.items() if name != "policy" for value in s.values()]

    def stepped(self) -> None:
        self._written = None

    def _put(self, name: str, back: ExitStack) -> None:
        self._fetch_policy()
        back.callback(surely, self._put_back)  # also after a part of what follows
        self._copy_from(name)

    def _put_back(self) -> None:
        self._copy_from("policy on the host")
        self._written = self._writes()

    @torch.no_grad()
    def _fetch_policy(self) -> list[torch.Tensor]:
        """The policy on the host, copied where it has changed.

        Waits for the device either way: what was sent from the host's tensors has arrived, and they may be
        written.
        """
        host = list(self._sets["policy on the host"].values())
        sums = self._sums()
        if self._written != self._writes() or not bool(sums.eq(self._summed).all()):
            self._written = None  # until all are copied
            for value, parameter in zip(host, self.trained()):
                value.copy_(parameter)
            self._written, self._summed = self._writes(), sums
        return host

    def _writes(self) -> int:
        """How often the policy's tensors were written to, through torch."""
        return sum(parameter._version for parameter in self.trained())

    def _sums(self) -> torch.Tensor:
        """For each tensor of the policy, the sum of its numbers' bits, as int64 on the device."""
        bits = (value.detach().view(INTEGERS[value.element_size()]) for value in self.trained())
        return torch.stack([value.sum(dtype=torch.int64) for value in bits])

    @torch.no_grad()
    def _copy_from(self, name: str) -> None:
        for parameter, value in zip(self.trained(), self._sets[name].values()):
            parameter.copy_(value, non_blocking=True)

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * policy."""
        for value, policy in zip(self._sets[name].values(), self._fetch_policy()):
            blend([value], [policy.float()], decay)


def surely(step: Callable[..., None], *arguments) -> None:
    """A step back to the policy. Where memory runs out it is tried again; then UserError."""
    try:
        step(*arguments)
        return
    except torch.OutOfMemoryError:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    try:
        step(*arguments)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory while the policy's weights were put back: the run ends here, and resumes from "
            "its last checkpoint with smaller micro-batches"
        ) from error
