"""What one call of a loss consists of: its tensors, what is static about it, and its numbers."""

import functools
from typing import NamedTuple

import torch

from . import checks

METHODS = ("measure", "reward", "crd", "nft", "awm", "dpo", "flow_matching")
WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")


class Latents(NamedTuple):
    """The tensors of shape (B, ...), strided as they come, and a seed per sample where there is no noise."""

    policy: torch.Tensor
    old: torch.Tensor | None
    ref_cond: torch.Tensor | None
    ref_uncond: torch.Tensor | None
    x0: torch.Tensor
    noise: torch.Tensor | None
    seed: torch.Tensor | None = None  # (B,) int64
    mask: torch.Tensor | None = None  # weight of each element, expanded to (B, ...)

    def check(self) -> None:
        """Raises TypeError or ValueError naming the tensor that does not go with policy."""
        policy, old, ref_cond, ref_uncond, x0, noise, seed, _ = self
        checks.latents(policy=policy, old=old, ref_cond=ref_cond, x0=x0, noise=noise, ref_uncond=ref_uncond)
        checks.given(x0=x0)
        checks.noise_or_seed(noise, seed, policy)


class Scalars(NamedTuple):
    """One entry per sample each, (B,), or None where the method does not need it."""

    advantage: torch.Tensor | None = None  # float; the weight of flow matching
    group: torch.Tensor | None = None  # integers
    sigma: torch.Tensor | None = None  # float
    kl_weight: torch.Tensor | None = None  # float
    old_error: torch.Tensor | None = None  # float, in place of the measured one

    def check(self, batch: int, device: torch.device) -> None:
        """Raises TypeError or ValueError naming the vector that is not one entry per sample on `device`."""
        for name, value in self._asdict().items():
            if value is not None:
                dtypes = checks.INTEGERS if name == "group" else checks.FLOATS
                checks.per_sample(name, value, batch, device, dtypes)


NOTHING = Scalars()


class Numbers(NamedTuple):
    """Numbers that may change from step to step without anything being compiled anew."""

    guidance_scale: float = 1.0
    mix: float = 0.0  # the first four sums are of (1 - mix) old + mix policy and (1 + mix) old - mix policy
    beta: float = 1.0
    kl_beta: float = 0.0
    kl_min: float = 0.0
    advantage_clip: float = 5.0
    temperature: float = float("inf")
    ratio_low: float = float("-inf")  # bounds of a probability ratio
    ratio_high: float = float("inf")
    old_kl_beta: float = 0.0  # strength of an anchor to `old`
    denominator: float = 0.0  # what sums over samples are divided by; 0: their number


class Kind(NamedTuple):
    """What is compiled in. Hashable, and a string between operators (`str(kind)`, `Kind.parse`)."""

    method: str
    adaptive_weighting: bool = False
    reward_adaptive_kl: bool = False
    bce: bool = False
    one_group: bool = False  # centering over all samples
    uncentered: bool = False  # no centering at all
    tempered: bool = False  # the temperature is finite
    off_policy: bool = False  # losses of a probability ratio of policy to old
    clipped: bool = False  # that ratio is bounded
    old_term: bool = False  # the gradient has a term c3 (policy - old), or the sums are of mixes of the two
    weighting: str = "uniform"

    @property
    def mixed(self) -> bool:
        """Whether the first sums may be of mixes of policy and old: where that is known to be not, less code
        is compiled."""
        return self.method == "nft" or (self.method == "measure" and self.old_term)

    def __str__(self) -> str:
        return "/".join([self.method, *(str(int(flag)) for flag in self[1:-1]), self.weighting])

    @staticmethod
    @functools.cache
    def parse(text: str) -> "Kind":
        method, *flags, weighting = text.split("/")
        return Kind._make([method, *(flag == "1" for flag in flags), weighting])


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 when any operand is float64, else float32. None is skipped."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def settings(function):
    """Remembers what a loss's settings were found to be: checking them costs more than launching a kernel.

    Arguments come by position: looking keywords up would double what a remembered call costs.
    Under torch.compile, where numbers may stand for any value, nothing is remembered.
    """
    remembered = functools.lru_cache(maxsize=256, typed=True)(function)

    @functools.wraps(function)
    def checked(*values):
        if torch.compiler.is_compiling():
            return function(*values)
        try:
            return remembered(*values)
        except TypeError:  # unhashable, or refused: say why
            return function(*values)

    return checked
