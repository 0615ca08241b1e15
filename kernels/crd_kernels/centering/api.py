"""center: from per-sample statistics to the losses and the two gradient coefficients of each sample.

B scalars in, B scalars out, in float64 whatever the dtype of the statistics: one launch on a GPU, one call of
C++ on the CPU (finish/), by the definition of reference.py.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from .. import checks, fused
from ..problem import Kind, Numbers, Scalars, settings
from ..velocity.stats import Stats
from .coefficients import Coefficients

if TYPE_CHECKING:  # absent from a torch without torch.distributed
    from torch.distributed import ProcessGroup


def center(
    stats: Stats,
    advantage: Tensor,  # (B,) float
    group: Tensor,  # (B,) int
    *,
    beta: float = 1.0,
    kl_beta: float = 0.1,
    kl_min: float = 1e-4,
    reward_adaptive_kl: bool = True,
    loss_type: str = "mse",
    temperature: float = float("inf"),
    centering: str = "prompt",
    advantage_clip: float = 5.0,
    kl_weight: Tensor | None = None,  # (B,) float
    denominator: float | None = None,
    process_group: "ProcessGroup | None" = None,
    impl: str = "auto",
) -> Coefficients:
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
    directions p = softmax(a / T) and p = softmax(-a / T). Temperature 0 is the hard selection of the public
    trainer: softmax(a) over the samples with a > 0 in one direction, and in the other, for which a < 0 would
    be selected and nothing is, the uniform p. kl_beta = 0 switches the anchor off, whatever kl_min.

    stats: from `measure`, all samples of every group that appears. advantage: the raw A_i. group: any
    integers, in any order, groups of any sizes. centering "batch" treats all samples as one group; "none"
    leaves out the sums over p, and temperature with them. Both are there for comparison.
    kl_weight multiplies k_i (an anchor evaluated for a random fraction f: mask / f). denominator replaces B
    in the means: with the B of the whole step, over all ranks, centering some of its groups at a time adds up
    to the whole.

    process_group: a torch.distributed group over whose ranks the groups may spread. Every rank passes its own
    samples, as many as it has, and gets its own coefficients. The means are then over all ranks' samples,
    times the number of ranks, so that averaging the ranks' gradients (and losses), as data parallel wrappers
    do, gives those of one process with all samples. Batch sizes are exchanged through the host; a rank
    without samples raises ValueError on every rank.

    Raises TypeError or ValueError naming the argument. NaN in a sample reaches the losses.
    Source: arXiv 2603.14128.
    """
    checks.given(advantage=advantage, group=group)
    kind, numbers = crd_settings(
        beta,
        kl_beta,
        kl_min,
        reward_adaptive_kl,
        loss_type,
        temperature,
        centering,
        advantage_clip,
        denominator,
    )
    scalars = Scalars(advantage, group, None, kl_weight)
    return fused.coefficients(stats, scalars, kind, numbers, impl, "center", process_group)


@settings
def crd_settings(
    beta,
    kl_beta,
    kl_min,
    reward_adaptive_kl,
    loss_type,
    temperature,
    centering,
    advantage_clip,
    denominator,
    guidance_scale=1.0,
    adaptive_weighting=False,
):
    """(Kind, Numbers) of the keywords of `center`, in its order. Raises TypeError or ValueError naming one.

    guidance_scale, adaptive_weighting: of `crd_loss`, which measures as well.
    """
    checks.number("guidance_scale", guidance_scale)
    checks.number("beta", beta, above=0)
    checks.number("kl_beta", kl_beta, at_least=0)
    checks.number("kl_min", kl_min, at_least=0)
    checks.flag("adaptive_weighting", adaptive_weighting)
    checks.flag("reward_adaptive_kl", reward_adaptive_kl)
    if kl_beta == 0 or not reward_adaptive_kl:
        kl_min = 0.0
    if kl_min > kl_beta:
        raise ValueError(f"kl_min: expected a number <= kl_beta = {kl_beta}, got {kl_min}")
    checks.number("temperature", temperature, at_least=0, infinite=True)
    checks.number("advantage_clip", advantage_clip, above=0)
    checks.choice("loss_type", loss_type, ("mse", "bce"))
    checks.choice("centering", centering, ("prompt", "batch", "none"))
    kind = Kind(
        "crd",
        adaptive_weighting=bool(adaptive_weighting),
        reward_adaptive_kl=bool(reward_adaptive_kl),
        bce=loss_type == "bce",
        one_group=centering == "batch",
        uncentered=centering == "none",
        tempered=temperature != float("inf") and centering != "none",
    )
    numbers = Numbers(
        guidance_scale=float(guidance_scale),
        beta=float(beta),
        kl_beta=float(kl_beta),
        kl_min=float(kl_min),
        advantage_clip=float(advantage_clip),
        temperature=float(temperature) if kind.tempered else 1.0,
        denominator=checks.denominator(denominator),
    )
    return kind, numbers
