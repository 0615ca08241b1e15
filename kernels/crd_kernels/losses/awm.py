"""Advantage-weighted matching."""

from torch import Tensor

from .. import checks, fused
from ..centering.coefficients import Coefficients
from ..problem import WEIGHTINGS, Kind, Latents, Numbers, Scalars, settings
from ..velocity.stats import Stats
from .common import LossOutput, loss_of


def awm_loss(
    policy: Tensor,  # (B, ...)
    ref_cond: Tensor | None,  # (B, ...)
    x0: Tensor,  # (B, ...)
    noise: Tensor | None,  # (B, ...)
    advantage: Tensor,  # (B,) float
    *,
    old: Tensor | None = None,  # (B, ...)
    old_error: Tensor | None = None,  # (B,) float
    clip_range: float | tuple[float, float] | None = None,
    ema: Tensor | None = None,  # (B, ...)
    ema_kl_beta: float = 0.0,
    sigma: Tensor | None = None,  # (B,) float
    weighting: str = "uniform",
    ref_uncond: Tensor | None = None,  # (B, ...)
    guidance_scale: float = 1.0,
    kl_beta: float = 0.0,
    advantage_clip: float = 5.0,
    kl_weight: Tensor | None = None,  # (B,) float
    denominator: float | None = None,
    seed: Tensor | None = None,  # (B,) int64
    mask: Tensor | None = None,  # broadcasts to (B, ...)
    impl: str = "auto",
) -> LossOutput:
    """Advantage-weighted matching. With e(v) = mean((v - target)^2) and A_i clipped to +-advantage_clip:

        loss = mean_i A_i g(e(policy_i)) + anchors                                        (on-policy)
        loss = -mean_i min(A_i rho_i, A_i clip(rho_i, 1 - below, 1 + above)) + anchors,
               rho_i = exp(g(e(old_i)) - g(e(policy_i)))                                  (off-policy)
        anchors = kl_beta mean_i w_i mean((policy_i - reference_i)^2)
                + ema_kl_beta mean_i mean((policy_i - ema_i)^2)

    g is the matching error weighed by the time t = sigma_i, 0 of clean latents and 1 of noise, which every
    weighting but "uniform" needs:
    "uniform" e, "t" t e, "t2" t^2 e, "huber" t (sqrt(e + 1e-10) - 1e-5), and
    "ghuber" 4 t ((e + 1e-10)^(1/4) - 1e-10^(1/4)).

    The weighed error stands in for the negative log-likelihood, so rho is the probability ratio of policy to
    `old`, the policy that the samples are from, for each sample and timestep. With `old`, or with its errors
    e(old_i) at the same noise as `old_error`, which spares its forward, the loss is off-policy; at policy =
    old the two forms have one gradient. clip_range: one number for both sides, or (below, above); None does
    not clip. ema: prediction of a moving average of the policy, to be held close to; it may be `old` itself,
    or else come with `old_error`. The reference is that of `measure`, kl_weight the w_i (1 where not given),
    denominator stands in place of B in the means. Returns a `LossOutput`, whose `old_deviation` is to `old`
    or `ema`; mask and errors as in `measure`.
    Source: Xue et al., "Advantage weighted matching", arXiv 2509.25050, and its public implementation for the
    weightings and the moving average; clipping as in PPO, arXiv 1707.06347.
    """
    checks.tensor("policy", policy)
    if ema is not None and old is not None and ema is not old:
        raise ValueError(
            "old: expected None or `ema` itself because ema is given (pass old_error), got a tensor"
        )
    if old is not None and old_error is not None:
        raise ValueError("old_error: expected None because old is given, got a tensor")
    if clip_range is not None and old is None and old_error is None:
        raise ValueError(f"clip_range: expected None without old or old_error, got {clip_range}")
    off_policy, old_term = old is not None or old_error is not None, ema is not None
    kind, numbers = _settings(
        off_policy,
        clip_range,
        ema_kl_beta,
        weighting,
        kl_beta,
        advantage_clip,
        denominator,
        old_term,
        guidance_scale,
    )
    if ema is None and ema_kl_beta > 0:
        raise ValueError(f"ema: expected a tensor because ema_kl_beta is {ema_kl_beta}, got None")
    ref_uncond = checks.guidance(policy, ref_cond, ref_uncond, guidance_scale)
    beside = old if ema is None else ema
    latents = Latents(policy, beside, ref_cond, ref_uncond, x0, noise, seed, checks.mask(mask, policy))
    scalars = Scalars(advantage, None, sigma, kl_weight, old_error)

    def check():
        if ema is not None:  # by its own name, before it is looked at as what stands beside the policy
            checks.given(ema=ema)
            checks.latents(policy=policy, ema=ema)
        checks.given(advantage=advantage)
        if weighting != "uniform":
            checks.given(sigma=sigma)

    return loss_of("awm_loss", latents, scalars, kind, numbers, impl, check)


def awm_coefficients(
    stats: Stats,
    advantage: Tensor,  # (B,) float
    *,
    off_policy: bool = False,
    clip_range: float | tuple[float, float] | None = None,
    ema_kl_beta: float = 0.0,
    sigma: Tensor | None = None,  # (B,) float
    weighting: str = "uniform",
    kl_beta: float = 0.0,
    advantage_clip: float = 5.0,
    kl_weight: Tensor | None = None,  # (B,) float
    denominator: float | None = None,
    impl: str = "auto",
) -> Coefficients:
    """`awm_loss` between the two passes, for trainers that micro-batch: losses and coefficients by sample.

    stats: from `measure`, whose `old` is the policy that the samples are from, of the ratio where
    `off_policy`, and at ema_kl_beta > 0 also what the policy is held close to; the result then has c3 and
    goes to `velocity_grad(..., old=old)`. Raises TypeError or ValueError naming the argument.
    """
    checks.given(advantage=advantage)
    if weighting != "uniform":
        checks.given(sigma=sigma)
    if clip_range is not None and not off_policy:
        raise ValueError(f"clip_range: expected None without off_policy, got {clip_range}")
    checks.flag("off_policy", off_policy)
    checks.number("ema_kl_beta", ema_kl_beta, at_least=0)
    off_policy, old_term = bool(off_policy), ema_kl_beta > 0
    kind, numbers = _settings(
        off_policy, clip_range, ema_kl_beta, weighting, kl_beta, advantage_clip, denominator, old_term
    )
    scalars = Scalars(advantage, None, sigma, kl_weight)
    return fused.coefficients(stats, scalars, kind, numbers, impl, "awm_coefficients")


@settings
def _settings(
    off_policy,
    clip_range,
    ema_kl_beta,
    weighting,
    kl_beta,
    advantage_clip,
    denominator,
    old_term,
    guidance_scale=1.0,
):
    checks.number("guidance_scale", guidance_scale)
    checks.number("kl_beta", kl_beta, at_least=0)
    checks.number("ema_kl_beta", ema_kl_beta, at_least=0)
    checks.number("advantage_clip", advantage_clip, above=0)
    checks.choice("weighting", weighting, WEIGHTINGS)
    below, above = _sides(clip_range)
    numbers = Numbers(
        guidance_scale=float(guidance_scale),
        kl_beta=float(kl_beta),
        advantage_clip=float(advantage_clip),
        ratio_low=1 - below,
        ratio_high=1 + above,
        old_kl_beta=float(ema_kl_beta),
        denominator=checks.denominator(denominator),
    )
    clipped = clip_range is not None
    kind = Kind("awm", off_policy=off_policy, clipped=clipped, old_term=old_term, weighting=weighting)
    return kind, numbers


def _sides(clip_range) -> tuple[float, float]:
    """How far the ratio may fall below 1 and rise above it."""
    if clip_range is None:
        return 0.0, 0.0
    sides = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if len(sides) != 2:
        raise ValueError(f"clip_range: expected a number or (below, above), got {len(sides)} numbers")
    for side in sides:
        checks.number("clip_range", side, above=0)
    return float(sides[0]), float(sides[1])
