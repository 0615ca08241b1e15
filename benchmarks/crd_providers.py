"""The CRD loss as people write it, to compare with: every provider takes the same inputs and returns a loss.

`eager_float64_weights` follows the public implementation of the method: bf16 residuals divided by float64
weights, so that the big tensors are promoted to float64. `eager` is the same formula written with care in
float32. Uniform weights, mse, adaptive weighting, reward-adaptive KL, guided reference: the published recipe.
"""

import torch
from crd_kernels import crd_loss

BETA, KL_BETA, KL_MIN, CLIP, GUIDANCE = 1.0, 0.1, 1e-4, 5.0, 4.5
LATENTS = ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise")


def inputs(samples, shape, dtype=torch.bfloat16, device="cpu", seed=0):
    """One group of `samples` latents of one shape, with advantages; predictions scatter around the target."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=random, device=device)

    x0, noise = normal(samples, *shape), normal(samples, *shape)
    old = noise - x0 + normal(samples, *shape)
    near = [old + 0.1 * normal(samples, *shape) for _ in range(3)]
    made = dict(zip(LATENTS, (near[0], old, near[1], near[2], x0, noise)))
    made = {name: value.to(dtype) for name, value in made.items()}
    made["policy"].requires_grad_()
    made["advantage"] = normal(samples)
    made["group"] = torch.zeros(samples, dtype=torch.int64, device=device)
    return made


def _center(reward, kl, advantage):
    a = advantage.clamp(-CLIP, CLIP) / (2 * CLIP) + 0.5
    delta = BETA * (reward - reward.detach().mean()) - (a - a.mean())
    k = KL_MIN + a * (KL_BETA - KL_MIN)
    return CLIP / BETA * (delta**2).mean() + (k * kl).mean()


def eager_float64_weights(policy, old, ref_cond, ref_uncond, x0, noise, advantage, group):
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


def eager(policy, old, ref_cond, ref_uncond, x0, noise, advantage, group):
    dims = tuple(range(1, policy.dim()))
    policy, old, ref_cond, ref_uncond, x0, noise = (
        x.float() for x in (policy, old, ref_cond, ref_uncond, x0, noise)
    )
    residual, old_residual = policy - (noise - x0), old - (noise - x0)
    scale = residual.detach().abs().mean(dims).clamp(min=1e-5)
    old_scale = old_residual.abs().mean(dims).clamp(min=1e-5)
    reward = (old_residual**2).mean(dims) / old_scale - (residual**2).mean(dims) / scale
    kl = ((policy - (ref_uncond + GUIDANCE * (ref_cond - ref_uncond))) ** 2).mean(dims)
    return _center(reward, kl, advantage)


compiled = torch.compile(eager)


def fused(impl):
    def loss(policy, old, ref_cond, ref_uncond, x0, noise, advantage, group):
        return crd_loss(
            policy,
            old,
            ref_cond,
            x0,
            noise,
            advantage,
            group,
            ref_uncond=ref_uncond,
            guidance_scale=GUIDANCE,
            impl=impl,
        ).loss

    return loss


PROVIDERS = {
    "eager_float64_weights": eager_float64_weights,
    "eager": eager,
    "torch.compile": compiled,
    "reference": fused("reference"),
    "ours": fused("auto"),
}


def oracle(made):
    """Loss and gradient of `eager` in float64 on the same (rounded) inputs."""
    exact = {name: made[name].detach().double() for name in (*LATENTS, "advantage")}
    policy = exact["policy"].requires_grad_()
    dims = tuple(range(1, policy.dim()))
    target = exact["noise"] - exact["x0"]
    scale = (policy.detach() - target).abs().mean(dims)
    old_scale = (exact["old"] - target).abs().mean(dims)
    reward = ((exact["old"] - target) ** 2).mean(dims) / old_scale - ((policy - target) ** 2).mean(
        dims
    ) / scale
    reference = exact["ref_uncond"] + GUIDANCE * (exact["ref_cond"] - exact["ref_uncond"])
    loss = _center(reward, ((policy - reference) ** 2).mean(dims), exact["advantage"])
    loss.backward()
    return loss.detach(), policy.grad
