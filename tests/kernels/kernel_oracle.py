"""An oracle for the CRD loss, written apart from the package: float64, one sample at a time, autograd."""

import math
import os

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # about a thousand times slower than a GPU


def make(batch=7, shape=(4, 6, 6), groups=(5, -2, 5, 9, -2, 5, 9), dtype=torch.float64, seed=0, spread=0.3):
    """Inputs of one loss call as a dict. The predictions scatter around the target like real ones."""
    random = torch.Generator("cpu").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64, device="cpu")

    x0, noise = normal(batch, *shape), normal(batch, *shape)
    old = noise - x0 + normal(batch, *shape)
    inputs = {
        "policy": old + spread * normal(batch, *shape),
        "old": old,
        "ref_cond": old + spread * normal(batch, *shape),
        "ref_uncond": old + spread * normal(batch, *shape),
        "x0": x0,
        "noise": noise,
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    inputs["advantage"] = 3 * normal(batch)
    inputs["group"] = torch.tensor([groups[i % len(groups)] for i in range(batch)])
    device = torch.get_default_device()
    return {name: value.to(device) for name, value in inputs.items()}


def reference_of(inputs, guidance_scale):
    if inputs["ref_cond"] is None:
        return None
    cond = inputs["ref_cond"].double()
    if guidance_scale <= 1:
        return cond
    uncond = inputs["ref_uncond"].double()
    return uncond + guidance_scale * (cond - uncond)


def crd(
    inputs,
    guidance_scale=1.0,
    beta=1.0,
    kl_beta=0.1,
    kl_min=1e-4,
    adaptive_weighting=True,
    reward_adaptive_kl=True,
    loss_type="mse",
    temperature=math.inf,
    centering="prompt",
    advantage_clip=5.0,
    mask=None,
):
    """Returns a dict with loss, policy_loss, kl_loss, implicit_reward, kl, old_kl, old_deviation, grad."""
    policy = inputs["policy"].detach().double().requires_grad_()
    old, x0, noise = (inputs[k].double() for k in ("old", "x0", "noise"))
    reference = reference_of(inputs, guidance_scale)
    batch, c = len(policy), advantage_clip
    ids = [0] * batch if centering == "batch" else inputs["group"].tolist()
    a = [min(max(min(max(v, -c), c) / (2 * c) + 0.5, 0.0), 1.0) for v in inputs["advantage"].tolist()]

    def mean_of(v, i):
        """Over the elements of sample i that the mask leaves, each as often as it says."""
        if mask is None:
            return v.mean()
        weight = mask.double().expand(policy.shape)[i]
        return (weight * torch.where(weight == 0, 0.0, v)).sum() / weight.sum()

    def scale(v, i):
        return max(mean_of((v[i] - noise[i] + x0[i]).abs(), i).item(), 1e-5) if adaptive_weighting else 1.0

    def error(v, i):
        return mean_of((v[i] - (noise[i] - x0[i])).pow(2), i) / scale(v, i)

    r = [error(old, i) - error(policy, i) for i in range(batch)]
    signs = [0.0] if math.isinf(temperature) else [1.0, -1.0]
    terms = []
    for i in range(batch):
        members = [j for j in range(batch) if ids[j] == ids[i]]
        for sign in signs:
            weight = [math.exp(sign * a[j] / temperature) for j in members]
            p = [0.0 if centering == "none" else x / sum(weight) for x in weight]
            rc = r[i] - sum(q * r[j].item() for q, j in zip(p, members))
            ac = a[i] - sum(q * a[j] for q, j in zip(p, members))
            if loss_type == "mse":
                term = (beta * rc - ac) ** 2
            else:
                y, z = 1 / (1 + math.exp(-ac)), beta * rc
                term = -(y * torch.nn.functional.logsigmoid(z) + (1 - y) * torch.nn.functional.logsigmoid(-z))
            terms.append(term / len(signs))
    policy_loss = c / beta * sum(terms) / batch
    zero = torch.zeros((), dtype=torch.float64)
    kl = [zero if reference is None else mean_of((policy[i] - reference[i]).pow(2), i) for i in range(batch)]
    k = [kl_min + a[i] * (kl_beta - kl_min) if reward_adaptive_kl else kl_beta for i in range(batch)]
    kl_loss = sum(k[i] * kl[i] for i in range(batch)) / batch
    loss = policy_loss + kl_loss
    loss.backward()
    mean = lambda x: torch.stack([mean_of(x[i], i) for i in range(batch)])  # noqa: E731
    return {
        "loss": loss.detach(),
        "policy_loss": policy_loss.detach(),
        "kl_loss": kl_loss.detach(),
        "implicit_reward": torch.stack(r).detach(),
        "kl": torch.stack(kl).detach(),
        "old_kl": torch.zeros(batch) if reference is None else mean((old - reference) ** 2),
        "old_deviation": mean((policy.detach() - old) ** 2),
        "grad": policy.grad,
    }


def relative_error(value, wanted):
    """Largest difference over the largest entry wanted; NaN anywhere in `value` is an infinite error."""
    value, wanted = value.detach().double(), wanted.detach().double()
    if torch.isnan(value).any():
        return math.inf
    top = wanted.abs().max().item()
    difference = (value - wanted).abs().max().item()
    return difference if top == 0 else difference / top
