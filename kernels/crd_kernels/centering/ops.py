"""Centering on the CPU as a registered operator: C++ where a compiler is found, torch ops otherwise.

Arguments are those of reference.py and arrive checked (api.py).
"""

import ctypes

import torch
from torch import Tensor

from ..native import build
from ..registration import register
from . import reference


@register
def center_op(
    rewards: Tensor,
    policy_scale: Tensor,
    kl: Tensor,
    anchored: Tensor,
    advantage: Tensor,
    group: Tensor,
    kl_weight: Tensor | None,
    numel: int,
    denominator: float | None,
    settings: list[float],
    reward_adaptive_kl: bool,
    loss_type: str,
) -> tuple[Tensor, Tensor]:
    """Losses (3,): their sum, the policy's, the anchor's; and the coefficients c1 and c2 (2, B)."""
    library = build.library()
    if library is None:
        out = reference.center(
            rewards,
            policy_scale,
            kl,
            anchored,
            advantage,
            group,
            kl_weight,
            numel,
            denominator,
            settings,
            reward_adaptive_kl,
            loss_type,
        )
        return torch.stack([out.loss, out.policy_loss, out.kl_loss]), torch.stack([out.c1, out.c2])
    batch = rewards.shape[0]
    losses, coefficients = rewards.new_empty(3), rewards.new_empty(2, batch)
    rows = [row.contiguous() for row in (rewards, policy_scale, kl, anchored)]
    vectors = [advantage.double().contiguous(), group.long().contiguous()]
    vectors.append(None if kl_weight is None else kl_weight.double().contiguous())
    operands = [*rows, *vectors, losses, coefficients]
    reals = (*settings, batch if denominator is None else denominator, numel)
    words = (reward_adaptive_kl, loss_type == "bce", batch, rewards.dtype == torch.float64)
    library.crd_center(
        (ctypes.c_double * 7)(*reals),
        (ctypes.c_int64 * 4)(*words),
        (ctypes.c_void_p * 9)(*(None if t is None else t.data_ptr() for t in operands)),
    )
    return losses, coefficients


@torch.library.register_fake("crd_kernels::center")
def _(rewards, policy_scale, kl, anchored, advantage, group, kl_weight, numel, denominator, *settings):
    return rewards.new_empty(3), rewards.new_empty(2, rewards.shape[0])
