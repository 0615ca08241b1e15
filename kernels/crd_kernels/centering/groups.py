"""Sums over groups given by arbitrary integer ids: ragged, in any order, deterministic, no host sync.

By comparing every id with every other: O(B^2) comparisons of B scalars, in blocks of rows so that memory
stays bounded. Sorting would need the group sizes on the host, scatter-adds would need atomics. NaN in one
group stays in that group.
"""

import torch

BLOCK = 1 << 21  # entries of the comparison matrix held at a time


def group_sum(values, group):
    """out_i = sum of values_j over all j with group_j == group_i. values: (..., B), group: (B,)."""
    return _over_groups(values, group, 0.0, lambda masked: masked.sum(-1))


def group_max(values, group):
    """out_i = max of values_j over all j with group_j == group_i."""
    return _over_groups(values, group, float("-inf"), lambda masked: masked.amax(-1))


def group_means(values, logits, group):
    """Means of each row of values, (R, B), over each entry's group, weighted by the softmax of the logits."""
    weights = torch.ones_like(values[:1])
    if logits is not None:
        weights = (logits - group_max(logits, group)).exp()[None]
    sums = group_sum(torch.cat([weights * values, weights]), group)
    return sums[:-1] / sums[-1]


def _over_groups(values, group, neutral, reduce):
    rows = max(1, BLOCK // values.numel())
    if rows >= group.shape[0]:
        return reduce(torch.where(group[:, None] == group, values[..., None, :], neutral))
    parts = [
        reduce(torch.where(block[:, None] == group, values[..., None, :], neutral))
        for block in group.split(rows)
    ]
    return torch.cat(parts, -1)
