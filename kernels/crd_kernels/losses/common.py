"""What the losses beside CRD share: one measurement, one output type, the map of the advantage."""

from dataclasses import dataclass

import torch

from .. import checks, dispatch
from ..velocity import Stats, ops
from ..velocity.api import attach_gradient


@dataclass(frozen=True)
class LossOutput:
    """Only `loss` carries a gradient, and to `policy` alone; the rest is detached."""

    loss: torch.Tensor  # scalar
    error: torch.Tensor  # (B,) mean((policy - target)^2)
    kl: torch.Tensor  # (B,) mean((policy - reference)^2); 0 without a reference
    old_deviation: torch.Tensor  # (B,) mean((policy - old)^2); 0 for losses without `old`


class Batch:
    """The tensors of one loss call, checked; measures them and attaches a gradient to a loss of them."""

    def __init__(self, policy, old, ref_cond, x0, noise, seed, ref_uncond, guidance_scale, impl):
        checks.latents(policy=policy, old=old, ref_cond=ref_cond, x0=x0, noise=noise, ref_uncond=ref_uncond)
        checks.given(x0=x0)
        checks.noise_or_seed(noise, seed, policy)
        self.policy, self.old, self.size, self.n = policy, old, policy.shape[0], policy.shape[1:].numel()
        self.inputs = (ref_cond, x0, noise)
        self.ref_uncond = checks.guidance(ref_cond, ref_uncond, guidance_scale)
        self.keywords = {
            "seed": seed,
            "guidance_scale": float(guidance_scale),
            "impl": dispatch.choose(impl, policy.device),
        }

    def per_sample(self, name, value, dtypes=checks.FLOATS):
        checks.per_sample(name, value, self.size, self.policy.device, dtypes)
        return value.double()

    @torch.no_grad()
    def measure(self, adaptive_weighting=False, mix=0.0):
        """Statistics as by `measure`; without `old` the policy stands in, its second read a cache hit."""
        ref_cond, x0, noise = self.inputs
        table = ops.measure_op(
            self.policy,
            self.policy if self.old is None else self.old,
            ref_cond,
            self.ref_uncond,
            x0,
            noise,
            self.keywords["seed"],
            self.keywords["guidance_scale"],
            adaptive_weighting,
            mix,
            self.keywords["impl"],
        )
        return Stats(*table.unbind(0), n=self.n)

    def attach(self, loss, stats, c1, c2=None, c3=None):
        """The loss in the statistics' dtype with the gradient of these float64 coefficients."""
        dtype = stats.kl.dtype
        c1, c2, c3 = (None if c is None else c.to(dtype) for c in (c1, c2, c3))
        c2 = torch.zeros_like(c1) if c2 is None else c2
        return attach_gradient(
            loss.to(dtype),
            c1,
            c2,
            self.policy,
            *self.inputs,
            c3=c3,
            old=self.old,
            ref_uncond=self.ref_uncond,
            **self.keywords,
        )


def unit_interval(advantage, advantage_clip):
    """a = clip(clip(A, -c, c) / (2c) + 1/2, 0, 1)."""
    a = advantage.clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5
    return a.clamp(0, 1)
