"""Diffusion DPO: preferred against rejected samples, relative to a reference."""

from torch import Tensor

from .. import checks
from ..problem import NOTHING, Kind, Latents, Numbers, settings
from .common import LossOutput, loss_of


def diffusion_dpo_loss(
    policy: Tensor,  # (2 P, ...): P preferred samples, then the P rejected ones in the same order
    reference: Tensor,  # (2 P, ...)
    x0: Tensor,  # (2 P, ...)
    noise: Tensor | None,  # (2 P, ...)
    *,
    beta: float = 5000.0,
    seed: Tensor | None = None,  # (2 P,) int64
    mask: Tensor | None = None,  # broadcasts to (2 P, ...)
    impl: str = "auto",
) -> LossOutput:
    """Direct preference optimization on flow-matching errors. With e(v) = mean((v - target)^2):

        g_j  = e(policy_j) - e(reference_j)
        loss = mean over pairs of -log sigmoid(-beta / 2 (g_preferred - g_rejected))

    The two of a pair are usually taken at the same sigma and noise. Returns a `LossOutput` whose `kl` is 0
    and whose `old_deviation` is mean((policy - reference)^2); mask and errors as in `measure`, and ValueError
    for an odd number of samples.
    Source: Wallace et al., "Diffusion model alignment using direct preference optimization", 2311.12908.
    """
    checks.tensor("policy", policy)
    kind, numbers = _settings(beta)
    latents = Latents(policy, reference, None, None, x0, noise, seed, checks.mask(mask, policy))

    def check():
        checks.given(reference=reference)
        checks.latents(policy=policy, reference=reference)
        if policy.shape[0] % 2:
            raise ValueError(f"policy: expected an even number of samples (pairs), got {policy.shape[0]}")

    return loss_of("diffusion_dpo_loss", latents, NOTHING, kind, numbers, impl, check)


@settings
def _settings(beta):
    checks.number("beta", beta, above=0)
    return Kind("dpo"), Numbers(beta=float(beta))
