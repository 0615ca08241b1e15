"""Centering in torch ops on B scalars, on any device and without a host sync: the definition."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Kind, Numbers, Scalars
from ..velocity.stats import Stats
from .distributed import gather
from .groups import Groups

if TYPE_CHECKING:  # absent from a torch without torch.distributed
    from torch.distributed import ProcessGroup


def unit_interval(advantage: Tensor, advantage_clip: float) -> Tensor:
    """a = clip(clip(A, -c, c) / (2c) + 1/2, 0, 1), float64."""
    a = advantage.double().clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5
    return a.clamp(0, 1)


def center(
    stats: Stats, scalars: Scalars, kind: Kind, numbers: Numbers, process_group: "ProcessGroup | None" = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The public `center` on checked arguments: policy_loss, kl_loss, c1, c2, in float64 throughout."""
    assert scalars.advantage is not None and scalars.group is not None
    reward, group = stats.implicit_reward.double(), scalars.group
    a = unit_interval(scalars.advantage, numbers.advantage_clip)
    if kind.one_group:
        group = torch.zeros_like(group)
    mine, all_reward, all_a, ranks = slice(None), reward, a, 1
    if process_group is not None:
        (all_reward, all_a, group), mine, ranks = gather(process_group, reward, a, group.long())
    samples = (numbers.denominator or all_reward.shape[0]) / ranks

    groups, both = Groups(group), torch.stack([all_reward, all_a])
    if not kind.tempered:
        weights = [torch.ones_like(all_a)]
    elif numbers.temperature == 0:
        weights = [groups.selected_weights(all_a), torch.ones_like(all_a)]
    else:
        weights = [groups.softmax_weights(tilted, numbers.temperature) for tilted in (all_a, -all_a)]
    policy_loss, slope = a.new_zeros(()), torch.zeros_like(a)  # slope: w_i = d policy_loss / d r_i
    for weight in weights:
        centers = groups.means(both, weight)[:, mine]
        if kind.uncentered:
            centers = torch.zeros_like(centers)
        loss, derivative = _terms(reward - centers[0], a - centers[1], numbers.beta, kind.bce)
        share = numbers.advantage_clip / numbers.beta / samples / len(weights)
        policy_loss = policy_loss + share * loss.sum()
        slope = slope + share * derivative

    k = torch.full_like(a, numbers.kl_beta)
    if kind.reward_adaptive_kl:
        k = numbers.kl_min + a * (numbers.kl_beta - numbers.kl_min)
    if scalars.kl_weight is not None:
        k = k * scalars.kl_weight.double()
    kl_loss = (k * stats.kl.double()).sum() / samples
    elements = stats.elements.double()
    c1 = -2 / elements * slope / stats.policy_scale.double()
    c2 = 2 / elements / samples * k * stats.anchored.double()
    return policy_loss, kl_loss, c1, c2


def _terms(r_centered: Tensor, a_centered: Tensor, beta: float, bce: bool) -> tuple[Tensor, Tensor]:
    """Each sample's term of the policy loss (before c / beta / B) and its derivative with respect to r_i."""
    if not bce:
        delta = beta * r_centered - a_centered
        return delta**2, 2 * beta * delta
    logits, labels = beta * r_centered, a_centered.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return loss, beta * (logits.sigmoid() - labels)
