"""center: from per-sample statistics to the losses and the two gradient coefficients of each sample.

B scalars in, B scalars out: plain torch on the device, the same for every implementation, no host sync.
Everything is computed in float64 (it costs nothing at this size) and returned in the statistics' dtype.
"""

import torch
import torch.nn.functional as F

from .. import checks
from .coefficients import Coefficients
from .distributed import gather
from .groups import group_means


@torch.no_grad()
def center(
    stats,
    advantage,  # (B,) float
    group,  # (B,) int
    *,
    beta=1.0,
    kl_beta=0.1,
    kl_min=1e-4,
    reward_adaptive_kl=True,
    loss_type="mse",
    temperature=float("inf"),
    centering="prompt",
    advantage_clip=5.0,
    kl_weight=None,  # (B,) float
    denominator=None,
    process_group=None,
):
    """Losses and gradient coefficients of centered reward distillation.

    With r the implicit rewards, c = advantage_clip, a_i = clip(clip(A_i, -c, c) / (2c) + 1/2, 0, 1), and for
    weights p_j >= 0 that sum to 1 over sample i's group

        delta_i     = beta (r_i - sum_j p_j r_j) - (a_i - sum_j p_j a_j)      (no gradient through the sums)
        policy_loss = c / beta * mean_i delta_i^2                                            ("mse")
                      c / beta * mean_i BCEWithLogits(beta r_centered_i, sigmoid(a_centered_i))  ("bce")
        kl_loss     = mean_i k_i kl_i,   k_i = kl_min + a_i (kl_beta - kl_min),   or kl_beta
        c1_i        = -2 w_i / (n s(policy_i)) with w_i = d policy_loss / d r_i
        c2_i        = 2 k_i / (n B)

    p is uniform at temperature inf; at a finite temperature T the policy loss is the average of the two
    directions p = softmax(a / T) and p = softmax(-a / T).

    stats: from `measure`, all samples of every group that appears. advantage: the raw A_i. group: any
    integers, in any order, groups of any sizes. centering "batch" treats all samples as one group.
    kl_weight multiplies k_i (an anchor evaluated for a random fraction f: mask / f). denominator replaces B
    in the means: with the B of the whole step, centering some of its groups at a time adds up to the whole.

    process_group: a torch.distributed group over whose ranks the groups may spread. Every rank passes its own
    samples, as many as it has, and gets its own coefficients. The means are then over all ranks' samples,
    times the number of ranks, so that averaging the ranks' gradients (and losses), as data parallel wrappers
    do, gives those of one process with all samples. Batch sizes are exchanged through the host.

    Raises TypeError or ValueError naming the argument. NaN in a sample reaches the losses.
    Source: arXiv 2603.14128.
    """
    _check(stats, advantage, group, kl_weight)
    checks.number("beta", beta, above=0)
    checks.number("kl_min", kl_min, at_least=0)
    checks.number("kl_beta", kl_beta)
    if kl_min > kl_beta:
        raise ValueError(f"kl_min: expected a number <= kl_beta = {kl_beta}, got {kl_min}")
    checks.number("temperature", temperature, above=0, infinite=True)
    checks.number("advantage_clip", advantage_clip, above=0)
    checks.choice("loss_type", loss_type, ("mse", "bce"))
    checks.choice("centering", centering, ("prompt", "batch"))
    if denominator is not None:
        checks.number("denominator", denominator, above=0)

    reward = stats.implicit_reward.double()
    a = advantage.double().clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5
    a = a.clamp(0, 1)
    ids = torch.zeros_like(group) if centering == "batch" else group
    samples, mine, all_reward, all_a = len(stats), slice(None), reward, a
    if process_group is not None:
        (all_reward, all_a, ids), mine, ranks = gather(process_group, reward, a, ids.long())
        samples = all_reward.shape[0] / ranks
    samples = samples if denominator is None else denominator

    directions = [None] if temperature == float("inf") else [all_a / temperature, -all_a / temperature]
    policy_loss, slope = 0.0, 0.0  # slope: w_i = d policy_loss / d r_i
    for logits in directions:
        centers = group_means(torch.stack([all_reward, all_a]), logits, ids)
        r_centered, a_centered = reward - centers[0, mine], a - centers[1, mine]
        loss, derivative = _terms(r_centered, a_centered, beta, loss_type)
        share = advantage_clip / beta / samples / len(directions)
        policy_loss = policy_loss + share * loss.sum()
        slope = slope + share * derivative

    k = kl_min + a * (kl_beta - kl_min) if reward_adaptive_kl else torch.full_like(a, kl_beta)
    if kl_weight is not None:
        k = k * kl_weight.double()
    kl_loss = (k * stats.kl.double()).sum() / samples

    dtype = stats.implicit_reward.dtype
    return Coefficients(
        loss=(policy_loss + kl_loss).to(dtype),
        policy_loss=policy_loss.to(dtype),
        kl_loss=kl_loss.to(dtype),
        c1=(-2 / stats.n * slope / stats.policy_scale.double()).to(dtype),
        c2=(2 / stats.n / samples * k * stats.anchored.double()).to(dtype),
    )


def _terms(r_centered, a_centered, beta, loss_type):
    """Each sample's term of the policy loss (before c / beta / B) and its derivative with respect to r_i."""
    if loss_type == "mse":
        delta = beta * r_centered - a_centered
        return delta**2, 2 * beta * delta
    logits, labels = beta * r_centered, a_centered.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return loss, beta * (logits.sigmoid() - labels)


def _check(stats, advantage, group, kl_weight):
    batch, device = len(stats), stats.implicit_reward.device
    if batch == 0:
        raise ValueError("stats: expected at least one sample, got none")
    checks.per_sample("advantage", advantage, batch, device)
    checks.per_sample("group", group, batch, device, checks.INTEGERS)
    if kl_weight is not None:
        checks.per_sample("kl_weight", kl_weight, batch, device)
