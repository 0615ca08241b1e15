"""DiffusionNFT: a positive and a negative branch around a moving reference."""

from torch import Tensor

from .. import checks, fused
from ..centering.coefficients import Coefficients
from ..problem import Kind, Latents, Numbers, Scalars, settings
from ..velocity.stats import Stats
from .common import LossOutput, loss_of


def nft_loss(
    policy: Tensor,  # (B, ...)
    old: Tensor,  # (B, ...)
    ref_cond: Tensor | None,  # (B, ...)
    x0: Tensor,  # (B, ...)
    noise: Tensor | None,  # (B, ...)
    advantage: Tensor,  # (B,) float
    sigma: Tensor,  # (B,) float
    *,
    ref_uncond: Tensor | None = None,  # (B, ...)
    guidance_scale: float = 1.0,
    beta: float = 1.0,
    kl_beta: float = 1e-4,
    advantage_clip: float = 5.0,
    adaptive_weighting: bool = True,
    kl_weight: Tensor | None = None,  # (B,) float
    denominator: float | None = None,
    seed: Tensor | None = None,  # (B,) int64
    mask: Tensor | None = None,  # broadcasts to (B, ...)
    impl: str = "auto",
) -> LossOutput:
    """Negative-aware fine-tuning. With a_i the advantage mapped to [0, 1] as in CRD and c = advantage_clip:

        positive = (1 - beta) old + beta policy        negative = (1 + beta) old - beta policy
        d(v)     = sigma mean((v - target)^2) / max(mean|v - target|, 1e-5 / sigma)     (no gradient below)
        loss     = c / beta mean_i (a_i d(positive_i) + (1 - a_i) d(negative_i)) + kl_beta mean_i w_i kl_i

    sigma: noise levels, above 0 (clean latents) and at most 1 (noise).
    d is the squared error of the clean latent x_sigma - sigma v, divided by its mean absolute error; without
    `adaptive_weighting` it is sigma^2 mean((v - target)^2). kl_weight: the w_i, 1 where not given.
    denominator: in place of B in the means. Returns a `LossOutput`; mask and errors as in `measure`.
    Source: Zheng et al., "DiffusionNFT", arXiv 2509.16117, and its public implementation for the weights.
    """
    checks.tensor("policy", policy)
    kind, numbers = _settings(beta, kl_beta, advantage_clip, adaptive_weighting, denominator, guidance_scale)
    ref_uncond = checks.guidance(policy, ref_cond, ref_uncond, guidance_scale)
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, checks.mask(mask, policy))
    scalars = Scalars(advantage, None, sigma, kl_weight)

    def check():
        checks.given(old=old, advantage=advantage, sigma=sigma)

    return loss_of("nft_loss", latents, scalars, kind, numbers, impl, check)


def nft_coefficients(
    stats: Stats,
    advantage: Tensor,  # (B,) float
    sigma: Tensor,  # (B,) float
    *,
    beta: float = 1.0,
    kl_beta: float = 1e-4,
    advantage_clip: float = 5.0,
    adaptive_weighting: bool = True,
    kl_weight: Tensor | None = None,  # (B,) float
    denominator: float | None = None,
    impl: str = "auto",
) -> Coefficients:
    """`nft_loss` between the two passes, for trainers that micro-batch: losses and c1, c2, c3 of each sample.

    stats: from `measure(..., mix=beta)` with the same `adaptive_weighting`. The result goes to
    `velocity_grad(..., old=old)`. Raises TypeError or ValueError naming the argument.
    """
    checks.given(advantage=advantage, sigma=sigma)
    kind, numbers = _settings(beta, kl_beta, advantage_clip, adaptive_weighting, denominator)
    scalars = Scalars(advantage, None, sigma, kl_weight)
    return fused.coefficients(stats, scalars, kind, numbers, impl, "nft_coefficients")


@settings
def _settings(beta, kl_beta, advantage_clip, adaptive_weighting, denominator, guidance_scale=1.0):
    checks.number("guidance_scale", guidance_scale)
    checks.number("beta", beta, above=0)
    checks.number("kl_beta", kl_beta, at_least=0)
    checks.number("advantage_clip", advantage_clip, above=0)
    checks.flag("adaptive_weighting", adaptive_weighting)
    numbers = Numbers(
        guidance_scale=float(guidance_scale),
        mix=float(beta),
        beta=float(beta),
        kl_beta=float(kl_beta),
        advantage_clip=float(advantage_clip),
        denominator=checks.denominator(denominator),
    )
    return Kind("nft", adaptive_weighting=bool(adaptive_weighting), old_term=True), numbers
