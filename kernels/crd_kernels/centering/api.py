"""center: from per-sample statistics to the losses and the two gradient coefficients of each sample.

B scalars in, B scalars out, in float64 whatever the dtype of the statistics: torch ops on the device and no
host sync (reference.py), on the CPU one call of C++ (center.cpp).
"""

import torch

from .. import checks, dispatch
from . import reference
from .coefficients import Coefficients
from .ops import center_op


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
    impl="auto",
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
    impl = dispatch.choose(impl, stats.implicit_reward.device)
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

    if centering == "batch":
        group = torch.zeros_like(group)
    arguments = (
        stats.implicit_reward,
        stats.policy_scale,
        stats.kl,
        stats.anchored,
        advantage,
        group,
        kl_weight,
        stats.n,
        None if denominator is None else float(denominator),
        [float(value) for value in (beta, kl_beta, kl_min, advantage_clip, temperature)],
        bool(reward_adaptive_kl),
        loss_type,
    )
    if impl == "cpu" and process_group is None:
        losses, coefficients = center_op(*arguments)
        return Coefficients(*losses.unbind(0), *coefficients.unbind(0))
    return reference.center(*arguments, process_group)


def _check(stats, advantage, group, kl_weight):
    batch, device = len(stats), stats.implicit_reward.device
    if batch == 0:
        raise ValueError("stats: expected at least one sample, got none")
    checks.per_sample("advantage", advantage, batch, device)
    checks.per_sample("group", group, batch, device, checks.INTEGERS)
    if kl_weight is not None:
        checks.per_sample("kl_weight", kl_weight, batch, device)
