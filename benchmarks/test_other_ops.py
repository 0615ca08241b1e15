"""The other losses and the noise ops against their eager definitions and torch.compile of them."""

import pytest
import torch
from conftest import SHAPES
from crd_kernels import awm_loss, diffusion_dpo_loss, flow_matching_loss, interpolate, nft_loss
from crd_kernels.losses import reference
from crd_providers import inputs

READS = {"flow_matching": (3, 3), "awm": (4, 4), "nft": (5, 5), "dpo": (4, 3)}  # forward, backward


@pytest.fixture(scope="module")
def made(workload, device):
    name, samples = workload
    tensors = inputs(samples, SHAPES[name], device=device)
    tensors["sigma"] = torch.full((samples,), 0.5, device=device)
    return tensors


def loss_of(op, provider):
    """A function of the tensors; the definitions get float32, as one writes them, and as oracle float64."""
    names = {
        "flow_matching": ("policy", "x0", "noise"),
        "awm": ("policy", "ref_cond", "x0", "noise", "advantage"),
        "nft": ("policy", "old", "ref_cond", "x0", "noise", "advantage", "sigma"),
        "dpo": ("policy", "old", "x0", "noise"),
    }[op]
    fused = dict(flow_matching=flow_matching_loss, awm=awm_loss, nft=nft_loss, dpo=diffusion_dpo_loss)[op]
    if provider == "ours":
        return lambda tensors: fused(*(tensors[name] for name in names)).loss
    definition = getattr(reference, fused.__name__)
    dtype = torch.float64 if provider == "oracle" else torch.float32

    def eager(*values):
        return definition(*(value.to(dtype) for value in values))

    function = torch.compile(eager) if provider == "torch.compile" else eager
    return lambda tensors: function(*(tensors[name] for name in names))


@pytest.mark.parametrize("provider", ["eager", "torch.compile", "ours"])
@pytest.mark.parametrize("op", READS)
def test_loss(benchmark, timed, made, workload, op, provider):
    function, policy = loss_of(op, provider), made["policy"]

    def both():
        policy.grad = None
        loss = function(made)
        loss.backward()
        return loss.detach()

    policy.grad = None
    wanted = loss_of(op, "oracle")(made)
    wanted.backward()
    gradient = policy.grad.double()
    close = bool(abs(both().double() - wanted) <= 1e-3 * abs(wanted))
    close &= bool((policy.grad.double() - gradient).norm() <= 2e-2 * gradient.norm())
    assert close, f"{provider}: wrong result, no speed reported"
    timed("both", both, (sum(READS[op]) + 1) * policy.nbytes)
    benchmark.extra_info |= {"op": op, "provider": provider, "shape": workload[0], "samples": workload[1]}


@pytest.mark.parametrize("provider", ["eager", "eager, new noise", "ours", "ours, new noise"])
def test_interpolate(benchmark, timed, made, workload, device, provider):
    x0, noise, sigma = made["x0"], made["noise"], made["sigma"]
    column = sigma.view(-1, *[1] * (x0.dim() - 1))
    seed = torch.arange(x0.shape[0], device=device)

    def eager(noise):
        return ((1 - column) * x0 + column * noise).to(x0.dtype)

    run = {
        "eager": lambda: eager(noise),
        "eager, new noise": lambda: eager(torch.randn_like(x0)),
        "ours": lambda: interpolate(x0, sigma, noise),
        "ours, new noise": lambda: interpolate(x0, sigma, seed=seed),
    }[provider]
    if "new" in provider:  # its noise is its own: mean and spread of what was mixed in
        mixed = (run().double() - 0.5 * x0.double()) / 0.5
        close = abs(mixed.mean()) < 0.01 and abs(mixed.std() - 1) < 0.02
    else:
        wanted = torch.lerp(x0.double(), noise.double(), 0.5)
        close = (run().double() - wanted).norm() <= 1e-2 * wanted.norm()
    assert close, f"{provider}: wrong result, no speed reported"
    timed("forward", run, (2 if "new" in provider else 3) * x0.nbytes)
    benchmark.extra_info |= {
        "op": "interpolate",
        "provider": provider,
        "shape": workload[0],
        "samples": workload[1],
    }
