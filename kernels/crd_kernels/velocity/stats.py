"""What is measured of each sample, and how sums over its elements become that."""

from dataclasses import dataclass, fields

import torch

SCALE_FLOOR = 1e-5
ROWS = 9  # rows of the table that the measure op returns, in the order of Stats' tensors


@dataclass(frozen=True)
class Stats:
    """Per-sample statistics of a batch: tensors of shape (B,), fp32, or fp64 when an input was fp64.

    `stats[i:j]`, `stats[mask]` and `stats[[3, 1]]` select samples, `Stats.cat` joins micro-batches.
    All means are over the n elements of one sample's latent.
    """

    implicit_reward: torch.Tensor  # r = -(policy_error / policy_scale - old_error / old_scale)
    policy_scale: torch.Tensor  # s(policy) = max(mean|policy - target|, 1e-5); 1 without adaptive weighting
    old_scale: torch.Tensor  # s(old)
    policy_error: torch.Tensor  # mean((policy - target)^2): the flow-matching loss of the policy
    old_error: torch.Tensor  # mean((old - target)^2)
    kl: torch.Tensor  # mean((policy - reference)^2); 0 without a reference
    old_kl: torch.Tensor  # mean((old - reference)^2); 0 without a reference
    old_deviation: torch.Tensor  # mean((policy - old)^2)
    anchored: torch.Tensor  # 1 where a reference was given, else 0
    n: int  # elements of one sample

    def __len__(self):
        return self.implicit_reward.shape[0]

    def __getitem__(self, index):
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return self._map(lambda value: value[index])

    def to(self, *args, **kwargs):
        """`Tensor.to` on every tensor."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def _map(self, function):
        return Stats(**{name: function(getattr(self, name)) for name in _NAMES}, n=self.n)

    @staticmethod
    def cat(parts):
        """The samples of all parts in order. Raises ValueError on an empty list or unequal n."""
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one Stats, got none")
        if len({part.n for part in parts}) > 1:
            raise ValueError(f"parts: expected one latent size, got {sorted({part.n for part in parts})}")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _NAMES}
        return Stats(**joined, n=parts[0].n)


_NAMES = tuple(field.name for field in fields(Stats) if field.name != "n")
assert len(_NAMES) == ROWS


def compute_dtype(*tensors):
    """float64 when any operand is float64, else float32. None is skipped."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def summarize(sums, n, anchored, adaptive_weighting, dtype):
    """sums: (7, B) float64, in the order of the kernels. Returns the (ROWS, B) table that `Stats` unpacks.

    In float64 to the last step: r is a small difference of two numbers near one.
    """
    policy_square, policy_abs, old_square, old_abs, kl, old_kl, deviation = sums / n
    if adaptive_weighting:
        policy_scale = policy_abs.clamp(min=SCALE_FLOOR)
        old_scale = old_abs.clamp(min=SCALE_FLOOR)
    else:
        policy_scale = old_scale = torch.ones_like(policy_abs)
    reward = old_square / old_scale - policy_square / policy_scale  # this way round equals give +0, not -0
    flag = torch.full_like(reward, float(anchored))
    rows = [reward, policy_scale, old_scale, policy_square, old_square, kl, old_kl, deviation, flag]
    return torch.stack(rows).to(dtype)
