"""Training weights in bfloat16: nothing small is lost, and groups stay exact."""

from types import SimpleNamespace

import pytest
import torch

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.weights.bf16 import RoundedAdamW, RoundedAdamW8bit, rounded, widen_gradients
from crd_fast.weights.full import HostWeights
from crd_fast.weights.make import make_optimizer
from tests.training.conftest import gradients


def test_rounding_is_right_on_average_and_keeps_what_bfloat16_holds():
    step = 2.0**-10  # an eighth of the unit above 1
    wide = torch.full((100_000,), 1 + step)
    assert (wide.bfloat16() == 1).all()
    found = rounded(wide.clone(), torch.Generator().manual_seed(0)).double()
    # standard error of the mean: 2^-7 * sqrt(1/8 * 7/8 / 1e5) = 8e-6
    assert found.mean() - 1 == pytest.approx(step, abs=4e-5)
    assert set(found.unique().tolist()) == {1.0, 1 + 2.0**-7}
    held = torch.randn(1000).bfloat16()
    assert torch.equal(rounded(held.float(), torch.Generator().manual_seed(1)), held)
    negative = rounded(-wide, torch.Generator().manual_seed(2)).double()
    assert negative.mean() + 1 == pytest.approx(-step, abs=4e-5)


@pytest.mark.parametrize("kind", [RoundedAdamW, RoundedAdamW8bit])
def test_small_steps_move_weights_and_are_lost_without_rounding_at_random(kind):
    def trained(kind):
        parameter = torch.nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = kind([parameter], lr=1e-3, weight_decay=0.0)
        optimizer.seed = 5
        dtype = torch.float32 if kind.__name__.startswith("Rounded") else torch.bfloat16
        parameter.grad_dtype = dtype
        for _ in range(5):
            parameter.grad = torch.ones_like(parameter, dtype=dtype)
            optimizer.step()
        return parameter.detach().double()

    assert (trained(kind.__mro__[2]) == 1).all()
    moved = trained(kind)
    # five steps of 1e-3; standard error at most 2^-8 / 2 * sqrt(5 / 8192) = 5e-5
    assert moved.mean() == pytest.approx(1 - 5e-3, abs=3e-4)
    assert torch.equal(moved, trained(kind))


def test_gradients_are_summed_in_float32():
    def summed(widen):
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        if widen:
            widen_gradients([parameter])
        for size in (256.0, *[0.5] * 1000):
            (parameter * size).sum().backward()
        return float(parameter.grad)

    assert summed(True) == 756 and summed(False) == 256


@pytest.mark.parametrize("micro_batch", [1, 3, 24])
def test_groups_are_exact(setting, micro_batch):
    model = setting[0]
    model.transformer.bfloat16()
    weights = HostWeights(model.transformer)
    widen_gradients(weights.trained())
    weights.blend("old", 0.4)
    narrow = (model, weights, *setting[2:])

    def cast(x, sigma, embeddings):
        inputs = torch.cat([x.flatten(1), sigma[:, None], embeddings["states"]], dim=1)
        return model.transformer(inputs.bfloat16()).view_as(x)

    model.velocity = cast
    _, whole = gradients(narrow, 24)
    _, split = gradients(narrow, micro_batch)
    assert whole.dtype == torch.float32
    error = (split - whole).norm() / whole.norm()
    print("relative error", float(error))
    assert error < 1e-2


def test_what_is_refused():
    with pytest.raises(UserError, match="snapshots: expected host with dtype bf16, got device"):
        build_recipe({"model": {"method": "full", "dtype": "bf16"}})
    with pytest.raises(UserError, match="expected default and device with method lora"):
        build_recipe({"model": {"snapshots": "host"}})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="paged_adamw8bit needs a CUDA GPU"):
            make_optimizer(build_recipe({}, ["train.optimizer=paged_adamw8bit"]), [])


def test_a_torch_without_wide_gradients_is_refused():
    old = SimpleNamespace()  # a parameter of such a torch would take the attribute, and gain nothing
    with pytest.raises(UserError, match=r"model.dtype: bf16 needs a torch with Tensor.grad_dtype, got 2"):
        widen_gradients([old])
