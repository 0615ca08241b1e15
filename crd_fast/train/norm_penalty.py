"""A penalty on velocities that are longer than those of the pretrained model, beside any method's loss."""

from __future__ import annotations

import torch

# Of a ratio above 1, by which policy and reference may differ where their weights are equal, as at a run's
# begin: which samples were penalised there would depend on the micro-batch.
ROUNDING = 1e-3


def mean_square(velocity: torch.Tensor) -> torch.Tensor:
    """The mean square of each sample, (B,), in float32, or in float64 for float64."""
    wide = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
    return wide.square().flatten(1).mean(1)


def norm_penalty(
    policy: torch.Tensor,  # (B, ...), detached
    reference: torch.Tensor,  # (B, ...), of the pretrained model, without guidance
    weight: torch.Tensor,  # (B,)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum_i weight_i max(|policy_i|^2 / |reference_i|^2 - 1, 0): its gradient for policy, in policy's dtype
    and shape, its terms and the ratios of the squared norms, (B,) each. Ratios up to 1 + ROUNDING count as 1.

    NormGuard (arXiv 2606.27771) has a hinge that acts where the policy's velocity is longer than the
    reference's; that it is one of the ratio of squares, so that all noise levels count alike, is a choice
    made here.
    """
    reference_square = mean_square(reference)
    ratio = mean_square(policy) / reference_square
    n = policy[0].numel()
    longer = weight * (ratio > 1 + ROUNDING)
    strength = longer * 2 / (n * reference_square)
    shape = (-1, *[1] * (policy.ndim - 1))
    gradient = (strength.view(shape) * policy).to(policy.dtype)
    return gradient, longer * (ratio - 1), ratio
