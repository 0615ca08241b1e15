"""Centering in torch ops on B scalars, on any device and without a host sync: the definition."""

import torch
import torch.nn.functional as F

from .coefficients import Coefficients
from .distributed import gather
from .groups import group_means


def center(
    rewards,  # (B,) and so are the next three, rows of `Stats`
    policy_scale,
    kl,
    anchored,
    advantage,  # (B,)
    group,  # (B,)
    kl_weight,  # (B,) or None
    numel,
    denominator,
    settings,
    reward_adaptive_kl,
    loss_type,
    process_group=None,
):
    """The public `center` on checked arguments. settings: beta, kl_beta, kl_min, advantage_clip, temperature.

    In float64 throughout: it costs nothing at this size.
    """
    beta, kl_beta, kl_min, advantage_clip, temperature = settings
    reward = rewards.double()
    a = advantage.double().clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5
    a = a.clamp(0, 1)
    samples, mine, all_reward, all_a = reward.shape[0], slice(None), reward, a
    if process_group is not None:
        (all_reward, all_a, group), mine, ranks = gather(process_group, reward, a, group.long())
        samples = all_reward.shape[0] / ranks
    samples = samples if denominator is None else denominator

    directions = [None] if temperature == float("inf") else [all_a / temperature, -all_a / temperature]
    policy_loss, slope = 0.0, 0.0  # slope: w_i = d policy_loss / d r_i
    for logits in directions:
        centers = group_means(torch.stack([all_reward, all_a]), logits, group)
        r_centered, a_centered = reward - centers[0, mine], a - centers[1, mine]
        loss, derivative = _terms(r_centered, a_centered, beta, loss_type)
        share = advantage_clip / beta / samples / len(directions)
        policy_loss = policy_loss + share * loss.sum()
        slope = slope + share * derivative

    k = kl_min + a * (kl_beta - kl_min) if reward_adaptive_kl else torch.full_like(a, kl_beta)
    if kl_weight is not None:
        k = k * kl_weight.double()
    kl_loss = (k * kl.double()).sum() / samples

    dtype = rewards.dtype
    return Coefficients(
        loss=(policy_loss + kl_loss).to(dtype),
        policy_loss=policy_loss.to(dtype),
        kl_loss=kl_loss.to(dtype),
        c1=(-2 / numel * slope / policy_scale.double()).to(dtype),
        c2=(2 / numel / samples * k * anchored.double()).to(dtype),
    )


def _terms(r_centered, a_centered, beta, loss_type):
    """Each sample's term of the policy loss (before c / beta / B) and its derivative with respect to r_i."""
    if loss_type == "mse":
        delta = beta * r_centered - a_centered
        return delta**2, 2 * beta * delta
    logits, labels = beta * r_centered, a_centered.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return loss, beta * (logits.sigmoid() - labels)
