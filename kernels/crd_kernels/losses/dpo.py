"""Diffusion DPO: preferred against rejected samples, relative to a reference."""

import torch
import torch.nn.functional as F

from .. import checks
from .common import Batch, LossOutput


def diffusion_dpo_loss(
    policy,  # (2 P, ...): P preferred samples, then the P rejected ones in the same order
    reference,  # (2 P, ...)
    x0,  # (2 P, ...)
    noise,  # (2 P, ...) or None
    *,
    beta=5000.0,
    seed=None,  # (2 P,) int64
    impl="auto",
):
    """Direct preference optimization on flow-matching errors. With e(v) = mean((v - target)^2):

        g_j  = e(policy_j) - e(reference_j)
        loss = mean over pairs of -log sigmoid(-beta / 2 (g_preferred - g_rejected))

    The two of a pair are usually taken at the same sigma and noise. Returns a `LossOutput` whose `kl` is 0
    and whose `old_deviation` is mean((policy - reference)^2); errors as in `measure`, and ValueError for an
    odd number of samples.
    Source: Wallace et al., "Diffusion model alignment using direct preference optimization", 2311.12908.
    """
    checks.number("beta", beta, above=0)
    checks.latents(policy=policy)
    if policy.shape[0] % 2:
        raise ValueError(f"policy: expected an even number of samples (pairs), got {policy.shape[0]}")
    checks.tensor("reference", reference)
    checks.latents(policy=policy, reference=reference)
    batch = Batch(policy, reference, None, x0, noise, seed, None, 1.0, impl)
    stats = batch.measure()
    gap = stats.policy_error.double() - stats.old_error.double()
    preferred, rejected = gap.chunk(2)
    logits = -beta / 2 * (preferred - rejected)
    pairs = logits.shape[0]
    loss = -F.logsigmoid(logits).sum() / pairs
    slope = beta / 2 / pairs * (-logits).sigmoid()  # d loss / d e(policy) of the preferred
    c1 = 2 / batch.n * torch.cat([slope, -slope])
    return LossOutput(batch.attach(loss, stats, c1), stats.policy_error, stats.kl, stats.old_deviation)
