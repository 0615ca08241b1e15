"""Vectors of different lengths from every rank, joined in rank order."""

import torch
import torch.distributed as dist


def gather(process_group, *vectors):
    """vectors: (B,) each, B this rank's own. Returns (joined vectors, this rank's slice of them, ranks)."""
    ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    length = torch.tensor([vectors[0].shape[0]], device=vectors[0].device)
    lengths = [torch.empty_like(length) for _ in range(ranks)]
    dist.all_gather(lengths, length, group=process_group)
    sizes = torch.cat(lengths).tolist()
    joined = []
    for vector in vectors:
        padded = torch.zeros(max(sizes), dtype=vector.dtype, device=vector.device)
        padded[: vector.shape[0]] = vector
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=process_group)
        joined.append(torch.cat([part[:size] for part, size in zip(parts, sizes)]))
    start = sum(sizes[:rank])
    return joined, slice(start, start + sizes[rank]), ranks
