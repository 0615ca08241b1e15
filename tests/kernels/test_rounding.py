"""What is stored in bf16 is what torch would store, to the bit: the nearest, ties to even, NaN stays NaN."""

from types import SimpleNamespace

import pytest
import torch
from crd_kernels import velocity_grad

BFLOAT16_WORDS = 2**16
# Two at a time, or one where their number is odd.
EVEN_AND_ODD = pytest.mark.parametrize("elements", [BFLOAT16_WORDS, BFLOAT16_WORDS - 1], ids=["even", "odd"])


def every_bfloat16():
    """All bit patterns, NaNs, infinities and denormals too."""
    return torch.arange(BFLOAT16_WORDS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def scaled(policy, c1):
    """(policy - 0) c1, rounded once in float32, so that what is left to see is how it is stored."""
    zeros, c1 = torch.zeros_like(policy), c1.expand(1)
    return velocity_grad(policy, None, zeros, zeros, SimpleNamespace(c1=c1, c2=c1), impl="cpu")


@EVEN_AND_ODD
@pytest.mark.parametrize("scale", [1.0, 1.00390625, 1.01171875, 1.0078126, 3e-3], ids=str)
def test_gradients_are_rounded_to_nearest_even(scale, elements):
    """1 + 1/256 and 1 + 3/256 put many products half way between two neighbours."""
    policy = every_bfloat16()[None, :elements]
    gradient = scaled(policy, torch.tensor(scale))
    wanted = (policy.float() * scale).bfloat16()
    nan = wanted.isnan()
    assert nan.any() and torch.equal(gradient.isnan(), nan)
    assert torch.equal(gradient[~nan].view(torch.int16), wanted[~nan].view(torch.int16))


@EVEN_AND_ODD
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=["positive", "negative"])
def test_a_nan_with_all_bits_set_is_not_rounded_to_zero(bits, elements):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert scaled(torch.ones(1, elements).bfloat16(), nan).isnan().all()
