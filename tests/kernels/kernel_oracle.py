"""Inputs of the CRD loss, what it is of them by the oracle, and how far an answer lies from that."""

import math
import os

import loss_oracle
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


def crd(inputs, mask=None, **settings):
    """A dict of what `crd_loss` returns for these inputs, with the gradient for policy as "grad"."""
    given = {name: value.detach() for name, value in {**inputs, "mask": mask}.items() if value is not None}
    tensors = {name: value if name == "group" else value.double() for name, value in given.items()}
    return loss_oracle.crd(loss_oracle.Case(tensors, settings))


def relative_error(value, wanted):
    """Largest difference over the largest entry wanted; NaN anywhere in `value` is an infinite error."""
    value, wanted = value.detach().double(), wanted.detach().double()
    if torch.isnan(value).any():
        return math.inf
    top = wanted.abs().max().item()
    difference = (value - wanted).abs().max().item()
    return difference if top == 0 else difference / top
