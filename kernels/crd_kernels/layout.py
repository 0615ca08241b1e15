"""How the kernels see a latent: (batch, up to seven inner dimensions), whatever its strides.

Neighbouring inner dimensions are merged where *every* operand allows it, so contiguous latents of any rank
become (batch, n), the halves of a doubled batch too, and a channel slice of packed tokens (batch, tokens,
channels). A mask that is broadcast over channels has stride 0 there. No operand is copied.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

DIMS = 7


def collapse(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[Any]]:
    """tensors: list of tensors of one shape (batch, ...), or None. Returns (sizes, strides).

    sizes: up to DIMS inner sizes; strides: per tensor the inner strides, or None. Raises ValueError where the
    latents cannot be described with DIMS dimensions.
    """
    given = [t for t in tensors if t is not None]
    if all(t[0].is_contiguous() for t in given):  # nearly every call; what the merge below would find
        return [given[0].shape[1:].numel()], [None if t is None else [1] for t in tensors]
    sizes, strides = _merge(list(given[0].shape[1:]), [list(t.stride()[1:]) for t in given])
    if len(sizes) > DIMS:
        raise ValueError(
            f"policy: expected latents that are described by at most {DIMS} dimensions a sample, got "
            f"{len(sizes)} of shape {tuple(given[0].shape)}: make them contiguous"
        )
    rows = iter(strides)
    return sizes, [None if t is None else next(rows) for t in tensors]


def _merge(sizes: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    merged: list[int] = []
    columns: list[list[int]] = []
    for size, *column in zip(sizes, *strides):
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(columns[-1], column)):
            merged[-1] *= size
            columns[-1] = column
        else:
            merged.append(size)
            columns.append(column)
    if not merged:
        return [1], [[1] for _ in strides]
    return merged, [list(row) for row in zip(*columns)]
