"""Vectors of different lengths from every rank, joined in rank order."""

import torch
import torch.distributed as dist


def everyone_has_samples(process_group, samples: int, device) -> list[int]:
    """Every rank's number of samples, through the host.

    Raises ValueError on every rank alike when one of them has none: nobody is left waiting.
    """
    length = torch.tensor([samples], device=device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(lengths, length, group=process_group)
    sizes = torch.cat(lengths).tolist()
    if empty := [rank for rank, size in enumerate(sizes) if size == 0]:
        raise ValueError(f"process_group: expected at least one sample on every rank, got none on {empty}")
    return sizes


def gather(process_group, *vectors):
    """vectors: (B,) each, B this rank's own. Returns (joined vectors, this rank's slice of them, ranks)."""
    sizes = everyone_has_samples(process_group, vectors[0].shape[0], vectors[0].device)
    joined = []
    for vector in vectors:
        padded = torch.zeros(max(sizes), dtype=vector.dtype, device=vector.device)
        padded[: vector.shape[0]] = vector
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=process_group)
        joined.append(torch.cat([part[:size] for part, size in zip(parts, sizes)]))
    rank = dist.get_rank(process_group)
    start = sum(sizes[:rank])
    return joined, slice(start, start + sizes[rank]), len(sizes)
