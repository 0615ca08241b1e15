"""The other losses and the noise op beside their lean formulas and torch.compile of them."""

import pytest
import torch
from crd_kernels import interpolate
from crd_providers import LOSSES, Provider, WrongResult, oracle


@pytest.mark.parametrize("name", ["ours", "torch.compile", "eager"])
@pytest.mark.parametrize("op", [op for op in LOSSES if op != "crd"])
def test_loss(benchmark, timed, tensors, workload, op, name):
    loss = LOSSES[op]
    wanted, provider = oracle(loss, tensors), Provider(loss, name, tensors)
    nbytes = loss.bytes(tensors["policy"].nbytes)
    timed("both", provider.both, nbytes, check=lambda: provider.check(wanted))
    benchmark.extra_info |= {"op": op, "provider": name, "shape": workload[0], "samples": workload[1]}


@pytest.mark.parametrize("provider", ["eager", "eager, new noise", "ours", "ours, new noise"])
def test_interpolate(benchmark, timed, tensors, workload, device, provider):
    x0, noise, sigma = tensors["x0"], tensors["noise"], tensors["sigma"]
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

    def check():
        if "new" in provider:  # its noise is its own: mean and spread of what was mixed in
            mixed = (run().double() - 0.5 * x0.double()) / 0.5
            close = abs(mixed.mean()) < 0.01 and abs(mixed.std() - 1) < 0.02
        else:
            wanted = torch.lerp(x0.double(), noise.double(), 0.5)
            close = (run().double() - wanted).norm() <= 1e-2 * wanted.norm()
        if not close:
            raise WrongResult(f"{provider}: wrong result, no speed reported")

    timed("forward", run, (2 if "new" in provider else 3) * x0.nbytes, check=check)
    benchmark.extra_info |= {
        "op": "interpolate",
        "provider": provider,
        "shape": workload[0],
        "samples": workload[1],
    }
