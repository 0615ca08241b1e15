"""How the kernels see a latent: (batch, up to four inner dimensions), whatever its rank and strides.

Neighbouring inner dimensions are merged where *every* operand allows it, so contiguous latents of any rank
become (batch, n), the halves of a doubled batch too, and a channel slice of packed tokens (batch, tokens,
channels). No operand is copied unless more than four inner dimensions remain.
"""

DIMS = 4


def collapse(tensors):
    """tensors: list of tensors of one shape (batch, ...), or None. Returns (tensors, sizes, strides).

    sizes: DIMS inner sizes, padded with 1 in front; strides: per tensor the DIMS inner strides, or None.
    The tensors come back as given, or copied where they cannot be described with DIMS dimensions.
    """
    given = [t for t in tensors if t is not None]
    if all(t[0].is_contiguous() for t in given):  # nearly every call; what the merge below would find
        strides = [None if t is None else [0] * (DIMS - 1) + [1] for t in tensors]
        return tensors, [1] * (DIMS - 1) + [given[0].shape[1:].numel()], strides
    sizes, strides = _merge(list(given[0].shape[1:]), [list(t.stride()[1:]) for t in given])
    if len(sizes) > DIMS:
        return collapse([None if t is None else t.contiguous() for t in tensors])
    pad = DIMS - len(sizes)
    padded = iter([[0] * pad + s for s in strides])
    return tensors, [1] * pad + sizes, [None if t is None else next(padded) for t in tensors]


def _merge(sizes, strides):
    merged, columns = [], []
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
