"""The five losses by every provider that is compared, on the same inputs.

A lean formula is the loss as one writes it with care: float32, no temporary more than it needs, and with
what the call below leaves out (one prompt group, no clipping of the ratio) left out as well. `eager` runs
it, `torch.compile` compiles it, and in float64 it is the oracle. `eager, float64 weights` follows the public
implementation of CRD: bf16 residuals divided by float64 weights, which promotes the big tensors to float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from crd_compiled import Compiled
from crd_kernels import awm_loss, crd_loss, diffusion_dpo_loss, flow_matching_loss, nft_loss

SHAPES = {
    "SD3.5-medium 512": (16, 64, 64),
    "SD3.5-medium 1024": (16, 128, 128),
    "FLUX.1 1024, packed": (4096, 64),
    "Qwen-Image 1328, packed": (6889, 64),
    "Wan 2.1 480p 81 frames": (16, 21, 60, 104),
}
BETA, KL_BETA, KL_MIN, CLIP, GUIDANCE = 1.0, 0.1, 1e-4, 5.0, 4.5
DPO_BETA, NFT_KL = 5000.0, 1e-4


class WrongResult(AssertionError):
    """A provider's loss or gradient is not the oracle's."""


def workloads(full):
    """(shape's name, samples): the quick ones, or every shape with 8 and 24 samples."""
    if full:
        return [(name, samples) for name in SHAPES for samples in (8, 24)]
    return [("SD3.5-medium 512", 8), ("SD3.5-medium 512", 24), ("SD3.5-medium 1024", 8)]


def inputs(samples, shape, dtype=torch.bfloat16, device="cpu", seed=0):
    """One group of `samples` latents of one shape, with advantages; predictions scatter around the target."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=random, device=device)

    x0, noise = normal(samples, *shape), normal(samples, *shape)
    old = noise - x0 + normal(samples, *shape)
    policy, ref_cond, ref_uncond = (old + 0.1 * normal(samples, *shape) for _ in range(3))
    latents = dict(policy=policy, old=old, ref_cond=ref_cond, ref_uncond=ref_uncond, x0=x0, noise=noise)
    made = {name: value.to(dtype) for name, value in latents.items()}
    made["policy"].requires_grad_()
    made["advantage"] = normal(samples)
    made["sigma"] = torch.full((samples,), 0.5, device=device)
    made["group"] = torch.zeros(samples, dtype=torch.int64, device=device)
    return made


def _mean(x):
    return x.flatten(1).mean(1)


def _unit(advantage):
    return advantage.clamp(-CLIP, CLIP) / (2 * CLIP) + 0.5


def _center(reward, kl, advantage):
    a = _unit(advantage)
    delta = BETA * (reward - reward.detach().mean()) - (a - a.mean())
    k = KL_MIN + a * (KL_BETA - KL_MIN)
    return CLIP / BETA * (delta**2).mean() + (k * kl).mean()


def lean_crd(policy, old, ref_cond, x0, noise, advantage, group, ref_uncond):
    residual, old_residual = policy - (noise - x0), old - (noise - x0)
    scale = _mean(residual.detach().abs()).clamp(min=1e-5)
    old_scale = _mean(old_residual.abs()).clamp(min=1e-5)
    reward = _mean(old_residual**2) / old_scale - _mean(residual**2) / scale
    kl = _mean((policy - (ref_uncond + GUIDANCE * (ref_cond - ref_uncond))) ** 2)
    return _center(reward, kl, advantage)


def lean_nft(policy, old, ref_cond, x0, noise, advantage, sigma):
    """At beta 1 the branches are the policy and its reflection at `old`."""

    def distance(velocity):
        residual = velocity - (noise - x0)
        scale = torch.maximum(_mean(residual.detach().abs()), 1e-5 / sigma)
        return sigma * _mean(residual**2) / scale

    a = _unit(advantage)
    loss = a * distance(policy) + (1 - a) * distance(2 * old - policy)
    return CLIP * loss.mean() + NFT_KL * ((policy - ref_cond) ** 2).mean()


def lean_awm(policy, ref_cond, x0, noise, advantage):
    error = _mean((policy - (noise - x0)) ** 2)
    return (advantage.clamp(-CLIP, CLIP) * error).mean() + KL_BETA * ((policy - ref_cond) ** 2).mean()


def lean_dpo(policy, reference, x0, noise):
    target = noise - x0
    preferred, rejected = (_mean((policy - target) ** 2) - _mean((reference - target) ** 2)).chunk(2)
    return -F.logsigmoid(-DPO_BETA / 2 * (preferred - rejected)).mean()


def lean_flow_matching(policy, x0, noise):
    return ((policy - (noise - x0)) ** 2).mean()


def float64_weights_crd(policy, old, ref_cond, x0, noise, advantage, group, ref_uncond):
    dims = tuple(range(1, policy.dim()))
    target = noise - x0

    def error(velocity):
        with torch.no_grad():
            weight = (velocity.double() - target.double()).abs().mean(dims, keepdim=True).clip(min=1e-5)
        return ((velocity - target) ** 2 / weight).mean(dims)

    with torch.no_grad():
        reference = ref_uncond + GUIDANCE * (ref_cond - ref_uncond)
        old_error = error(old)
    kl = ((policy - reference) ** 2).mean(dims)
    return _center(old_error - error(policy), kl, advantage)


@dataclass(frozen=True)
class Loss:
    """One loss: ours, its lean formula, and the tensors both take, by their names in `inputs`."""

    fused: Callable
    lean: Callable
    tensors: tuple[str, ...]  # positional arguments of both
    reads: tuple[int, int]  # latents that must be read in the forward and in the backward
    named: tuple[str, ...] = ()  # tensors that `fused` takes by name and `lean` after the others
    settings: dict = field(default_factory=dict)  # of `fused`
    others: dict[str, Callable] = field(default_factory=dict)  # further formulas, run as they are

    def bytes(self, latent_bytes):
        """What two passes must move, forward and backward: their reads and the gradient."""
        return (sum(self.reads) + 1) * latent_bytes

    def baselines(self):
        """Names of the providers that ours is compared with."""
        return ("torch.compile", "eager", *self.others)


LOSSES = {
    "crd": Loss(
        crd_loss,
        lean_crd,
        ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group"),
        reads=(6, 5),
        named=("ref_uncond",),
        settings={"guidance_scale": GUIDANCE, "beta": BETA, "kl_beta": KL_BETA, "kl_min": KL_MIN},
        others={"eager, float64 weights": float64_weights_crd},
    ),
    "nft": Loss(
        nft_loss,
        lean_nft,
        ("policy", "old", "ref_cond", "x0", "noise", "advantage", "sigma"),
        reads=(5, 5),
        settings={"kl_beta": NFT_KL},
    ),
    "awm": Loss(
        awm_loss,
        lean_awm,
        ("policy", "ref_cond", "x0", "noise", "advantage"),
        reads=(4, 4),
        settings={"kl_beta": KL_BETA},
    ),
    "dpo": Loss(
        diffusion_dpo_loss,
        lean_dpo,
        ("policy", "old", "x0", "noise"),
        reads=(4, 3),
        settings={"beta": DPO_BETA},
    ),
    "flow_matching": Loss(flow_matching_loss, lean_flow_matching, ("policy", "x0", "noise"), reads=(3, 3)),
}


def eager(loss):
    """The lean formula, computing in float32 whatever the latents are."""

    def formula(*tensors):
        return loss.lean(*(t.float() if t.is_floating_point() else t for t in tensors))

    return formula


def oracle(loss, tensors):
    """Loss and gradient of the lean formula in float64 on the same (rounded) inputs."""
    exact = {
        name: value.detach().double() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    policy = exact["policy"].requires_grad_()
    value = loss.lean(*(exact[name] for name in loss.tensors + loss.named))
    return value.detach(), torch.autograd.grad(value, policy)[0]


class Provider:
    """One way to compute a loss on given tensors: `forward()` is the scalar, `both()` the gradient.

    name: "ours", "reference" (our readable definition), "eager", "torch.compile", or one of `loss.others`.
    impl: which of our implementations "ours" is.
    """

    def __init__(self, loss, name, tensors, impl="auto"):
        self.name, self.policy, self.compiled = name, tensors["policy"], None
        policy, arguments = self.policy, [tensors[n] for n in loss.tensors]
        if name in ("ours", "reference"):
            fused, settings = loss.fused, loss.settings | {n: tensors[n] for n in loss.named}
            settings["impl"] = "reference" if name == "reference" else impl
            self.forward = lambda: fused(*arguments, **settings).loss
        else:
            arguments += [tensors[n] for n in loss.named]
            function = loss.others.get(name) or eager(loss)
            if name == "torch.compile":
                self.compiled = Compiled(function)
                function = self.compiled.function
            self.forward = lambda: function(*arguments)
        self.both = lambda: torch.autograd.grad(self.forward(), policy)

    def backward(self, value):
        return torch.autograd.grad(value, self.policy)

    def check(self, wanted):
        """Raises WrongResult where loss or gradient is further from the oracle's than bf16 rounding explains,
        NotCompiled where torch.compile did not run what it compiled. No figure without it, before and after.
        """
        value = self.forward()
        if self.compiled:
            self.compiled.check(value)
        (gradient,) = self.backward(value)
        loss, exact = wanted
        close = bool(abs(value.detach().double() - loss) <= 1e-3 * abs(loss))
        close &= bool((gradient.double() - exact).norm() <= 1e-2 * exact.norm())
        if not close:
            raise WrongResult(f"{self.name}: wrong result, no speed reported")
