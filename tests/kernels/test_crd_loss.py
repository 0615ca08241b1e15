"""crd_loss against the oracle: every setting, dtype, rank and layout."""

import itertools
import math

import numpy as np
import pytest
import torch
from crd_kernels import CRDLoss, crd_loss
from kernel_oracle import INTERPRETING, crd, make, relative_error

TENSORS = ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group")
OUTPUTS = ("loss", "policy_loss", "kl_loss", "implicit_reward", "kl", "old_kl", "old_deviation")


def call(inputs, impl, **settings):
    """Runs crd_loss and its backward; returns the oracle's dict."""
    policy = inputs["policy"].detach().requires_grad_()
    args = [policy, *(inputs[name] for name in TENSORS[1:])]
    out = crd_loss(*args, ref_uncond=inputs["ref_uncond"], impl=impl, **settings)
    out.loss.backward()
    return {**{name: getattr(out, name) for name in OUTPUTS}, "grad": policy.grad}


# Half a unit in the last place; Triton's interpreter cuts bf16 off where hardware rounds.
BF16 = 2**-7 if INTERPRETING else 2**-8 * 1.01


def compare(got, wanted, tolerance, keys=None):
    for key in keys or wanted:
        assert relative_error(got[key], wanted[key]) < tolerance, key


SETTINGS = [
    dict(zip(("loss_type", "temperature", "centering", "adaptive_weighting", "reward_adaptive_kl"), values))
    for values in itertools.product(
        ("mse", "bce"), (math.inf, 0.5), ("prompt", "batch", "none"), (True, False), (True, False)
    )
]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_every_setting_in_float64(impl, guidance_scale):
    inputs = make()
    for index, settings in list(enumerate(SETTINGS))[:: 5 if INTERPRETING else 1]:
        settings = settings | {
            "guidance_scale": guidance_scale,
            "beta": 0.7 + index,
            "kl_beta": 0.02,
            "advantage_clip": 2.5,
        }
        compare(call(inputs, impl, **settings), crd(inputs, **settings), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs(impl, dtype):
    """The inputs are rounded once; everything else is exact to float32. The gradient is stored in `dtype`."""
    inputs = make(dtype=dtype)
    settings = {"guidance_scale": 4.5, "beta": 3.0}
    got, wanted = call(inputs, impl, **settings), crd(inputs, **settings)
    assert got["grad"].dtype == dtype and got["loss"].dtype == torch.float32
    compare(got, wanted, 2e-5, keys=set(wanted) - {"grad"})
    compare(got, wanted, max(2e-5, torch.finfo(dtype).eps), keys=["grad"])


def test_mixed_dtypes(impl):
    inputs = make()
    mix = dict(zip(TENSORS, (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32)))
    inputs |= {name: inputs[name].to(dtype) for name, dtype in mix.items()}
    inputs["ref_uncond"] = inputs["ref_uncond"].bfloat16()
    got, wanted = call(inputs, impl, guidance_scale=2.0), crd(inputs, guidance_scale=2.0)
    compare(got, wanted, 2e-5, keys=set(wanted) - {"grad"})
    compare(got, wanted, BF16, keys=["grad"])


def test_one_float64_input_makes_float64(impl):
    inputs = make(dtype=torch.float32)
    inputs["x0"] = inputs["x0"].double() + 1e-9
    for dtype, tolerance in ((torch.float32, 1e-7), (torch.bfloat16, BF16)):
        inputs["policy"] = inputs["policy"].to(dtype)
        got, wanted = call(inputs, impl, guidance_scale=3.7), crd(inputs, guidance_scale=3.7)
        compare(got, wanted, 1e-11, keys=set(wanted) - {"grad"})
        compare(got, wanted, tolerance, keys=["grad"])
        assert got["loss"].dtype == torch.float64 and got["grad"].dtype == dtype


@pytest.mark.parametrize(
    "shape",
    [
        (1,),  # one element
        (63,),  # below one vector, odd
        (500,),  # no power of two
        (1009,),  # prime, below one tile
        (4096,),  # whole blocks only
        (3, 5, 7, 2, 2),  # video rank, odd
        (20000,),  # several tiles and, by one chunk of 16384, two partial sums
        (3, 181, 67),  # several chunks, none aligned with a row
    ],
)
def test_shapes(impl, shape):
    inputs = make(batch=3, shape=shape, groups=(1, 1, 0))
    compare(call(inputs, impl, guidance_scale=4.5), crd(inputs, guidance_scale=4.5), 1e-11)


@pytest.mark.skipif(INTERPRETING, reason="minutes in the interpreter")
def test_float32_sums_stay_accurate_over_four_million_elements(impl):
    inputs = make(batch=2, shape=(4_000_037,), dtype=torch.float32, groups=(0,))
    got, wanted = call(inputs, impl), crd(inputs)
    compare(got, wanted, 1e-6, keys=("kl", "old_kl", "old_deviation", "kl_loss"))
    assert (got["implicit_reward"] - wanted["implicit_reward"]).abs().max() < 3e-7  # of means that are near 1


def test_offsets_beyond_32_bits(impl):
    """Two samples whose elements lie 2^30 apart: no copy could hide a 32-bit offset."""
    stride = 2**30 + 8
    if torch.get_default_device().type == "cpu":
        memory = torch.from_numpy(np.empty(2 * stride + 2, dtype=np.float16))  # never touched, so never there
    else:
        memory = torch.zeros(2 * stride + 2, dtype=torch.float16)
    inputs = make(batch=2, shape=(3,), dtype=torch.float16, groups=(0,))
    far = memory.as_strided((2, 3), (1, stride))
    far.copy_(inputs["policy"])
    assert sum((size - 1) * step for size, step in zip(far.shape, far.stride())) > 2**31
    compare(call(inputs | {"old": far}, impl), crd(inputs | {"old": far}), 1e-3)
    inputs["old"] = far.clone()
    got = call(inputs | {"x0": far}, impl)
    compare(got, crd(inputs | {"x0": far}), 1e-3)


def test_samples_beyond_32_bits(impl):
    """The batch's stride alone exceeds 2^31."""
    stride = 2**31 + 8
    if torch.get_default_device().type == "cpu":
        memory = torch.from_numpy(np.empty(stride + 16, dtype=np.float16))  # never touched, so never there
    else:
        memory = torch.zeros(stride + 16, dtype=torch.float16)
    inputs = make(batch=2, shape=(3,), dtype=torch.float16, groups=(0,))
    far = memory.as_strided((2, 3), (stride, 1))
    far.copy_(inputs["x0"])
    compare(call(inputs | {"x0": far}, impl), crd(inputs), 1e-3)


def test_bf16_error_is_no_larger_than_eager_bf16(impl):
    inputs = make(shape=(8, 30, 30), dtype=torch.bfloat16, spread=0.05)
    got, wanted = call(inputs, impl, guidance_scale=4.5), crd(inputs, guidance_scale=4.5)
    policy = inputs["policy"].clone().requires_grad_()
    eager = _eager({**inputs, "policy": policy}, 4.5)
    eager["loss"].backward()
    eager["grad"] = policy.grad
    for key in ("loss", "implicit_reward", "kl", "grad"):
        assert relative_error(got[key], wanted[key]) <= relative_error(eager[key], wanted[key]), key


def _eager(x, guidance_scale):
    """The formulas in the inputs' own dtype, as one writes them down."""
    mean = lambda v: v.flatten(1).mean(1)  # noqa: E731
    target = x["noise"] - x["x0"]
    residual, old_residual = x["policy"] - target, x["old"] - target
    scale, old_scale = (mean(v.detach().abs()).clamp(min=1e-5) for v in (residual, old_residual))
    r = mean(old_residual**2) / old_scale - mean(residual**2) / scale
    reference = x["ref_uncond"] + guidance_scale * (x["ref_cond"] - x["ref_uncond"])
    kl = mean((x["policy"] - reference) ** 2)
    a = x["advantage"].clamp(-5, 5) / 10 + 0.5
    same = (x["group"][:, None] == x["group"][None]).double()
    average = lambda v: same @ v.detach().double() / same.sum(1)  # noqa: E731
    delta = (r - average(r)) - (a - average(a))
    loss = 5 * (delta**2).mean() + ((1e-4 + a * (0.1 - 1e-4)) * kl).mean()
    return {"loss": loss, "implicit_reward": r, "kl": kl}


def _doubled_halves(x):
    return torch.cat([torch.full_like(x, math.nan), x])[len(x) :]


def _channel_slice(x):
    return torch.cat([x, torch.full_like(x, math.nan)], dim=-1)[..., : x.shape[-1]]


def _channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _every_other(x):
    return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]


def _batch_last(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS = [_doubled_halves, _channel_slice, _channels_last, _every_other, _batch_last]


@pytest.mark.parametrize("shape", [(4, 5, 6), (3, 2, 3, 2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(impl, layout, shape):
    inputs = make(batch=4, shape=shape, groups=(0, 1))
    wanted = crd(inputs, guidance_scale=4.5)
    alone = dict(inputs)
    for name in ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise"):
        alone[name] = layout(inputs[name])
        assert torch.equal(alone[name], inputs[name])
        compare(call(inputs | {name: alone[name]}, impl, guidance_scale=4.5), wanted, 1e-11)
    compare(call(alone, impl, guidance_scale=4.5), wanted, 1e-11)


def test_expanded_reference(impl):
    """A reference shared by the batch comes as an expanded view of stride 0."""
    inputs = make()
    inputs["ref_uncond"] = inputs["ref_uncond"][:1].expand_as(inputs["policy"])
    compare(call(inputs, impl, guidance_scale=4.5), crd(inputs, guidance_scale=4.5), 1e-11)


def assert_exactly_zero(x):
    assert torch.equal(x, torch.zeros_like(x)) and not x.signbit().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adaptive_weighting", [True, False])
def test_equal_policy_and_old_reward_exactly_zero(impl, dtype, adaptive_weighting):
    inputs = make(shape=(20011,), dtype=dtype)
    inputs["old"] = inputs["policy"].clone()
    got = call(inputs, impl, adaptive_weighting=adaptive_weighting)
    assert_exactly_zero(got["implicit_reward"])
    assert_exactly_zero(got["old_deviation"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_values_in_other_dtypes_and_layouts_are_exactly_zero(impl, layout):
    inputs = make(shape=(8, 50, 50), dtype=torch.bfloat16)
    inputs["old"] = layout(inputs["policy"].float())
    assert_exactly_zero(call(inputs, impl)["implicit_reward"])


def test_no_reference(impl):
    inputs = make() | {"ref_cond": None, "ref_uncond": None}
    got = call(inputs, impl, guidance_scale=4.5)
    compare(got, crd(inputs), 1e-11)
    assert got["kl_loss"] == 0 and not got["kl"].any()


def test_scale_floor(impl):
    """A policy that hits the target within 1e-5 divides by the floor."""
    inputs = make()
    inputs["policy"] = inputs["noise"] - inputs["x0"] + 1e-7 * inputs["policy"]
    compare(call(inputs, impl), crd(inputs), 1e-8)


@pytest.mark.parametrize("name", ["policy", "old", "ref_cond", "ref_uncond", "x0", "noise", "advantage"])
def test_nan_reaches_the_loss(impl, name):
    inputs = make()
    inputs[name].view(-1)[3] = math.nan
    assert call(inputs, impl, guidance_scale=4.5)["loss"].isnan()


def test_nan_stays_in_its_group(impl):
    inputs = make()
    inputs["policy"][0, 0, 0, 0] = math.nan
    grad = call(inputs, impl)["grad"]
    others = inputs["group"] != inputs["group"][0]
    assert grad[~others].isnan().any() and not grad[others].isnan().any()


def test_two_calls_agree_to_the_bit(impl):
    inputs = make(batch=2, shape=(40000,), dtype=torch.bfloat16)
    first, second = (call(inputs, impl, guidance_scale=4.5) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_threads_do_not_change_the_result():
    inputs = make(shape=(40000,), dtype=torch.bfloat16)
    first = call(inputs, "cpu", guidance_scale=4.5)
    torch.set_num_threads(3)
    second = call(inputs, "cpu", guidance_scale=4.5)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_gradient_by_finite_differences(impl):
    """Independent of any autograd; with s constant, because no gradient flows through s and the sums."""
    samples, elements = 3, 3
    inputs = make(batch=samples, shape=(elements,), groups=(0, 1))
    settings = {"guidance_scale": 4.5, "adaptive_weighting": False, "centering": "prompt"}
    grad = call(inputs, impl, **settings)["grad"]
    base = call(inputs, impl, **settings)["implicit_reward"]
    step, numeric = 1e-5, torch.zeros_like(grad)
    for position in itertools.product(range(samples), range(elements)):
        values = []
        for sign in (1, -1):
            moved = {name: value.clone() for name, value in inputs.items()}
            moved["policy"][position] += sign * step
            values.append(_loss_with_fixed_sums(call(moved, impl, **settings), base, inputs))
        numeric[position] = (values[0] - values[1]) / (2 * step)
    assert relative_error(grad, numeric) < 1e-7


def _loss_with_fixed_sums(got, base, inputs):
    """The loss as a function of r_i and kl_i, with the group means of the unmoved batch."""
    a = inputs["advantage"].clamp(-5, 5) / 10 + 0.5
    mean = lambda x: torch.stack([x[inputs["group"] == g].mean() for g in inputs["group"]])  # noqa: E731
    delta = got["implicit_reward"] - mean(base) - (a - mean(a))
    return (5 * delta**2 + (1e-4 + a * (0.1 - 1e-4)) * got["kl"]).mean()


def test_gradient_scales_with_the_incoming_one_and_accumulates(impl):
    inputs = make()
    wanted = crd(inputs)["grad"]
    policy = inputs["policy"].clone().requires_grad_()
    loss = crd_loss(policy, *(inputs[name] for name in TENSORS[1:]), impl=impl).loss
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    assert relative_error(policy.grad, 4 * wanted) < 1e-11


def test_gradient_flows_to_the_policy_alone(impl):
    inputs = make()
    tensors = [inputs[name].clone().requires_grad_() for name in TENSORS[:6]]
    out = crd_loss(*tensors, inputs["group"], impl=impl)
    out.loss.backward()
    assert tensors[0].grad is not None and all(t.grad is None for t in tensors[1:])
    assert not any(getattr(out, name).requires_grad for name in OUTPUTS[1:])


def test_no_grad_mode(impl):
    inputs = make()
    with torch.no_grad():
        out = crd_loss(*(inputs[name].requires_grad_(i == 0) for i, name in enumerate(TENSORS)), impl=impl)
    assert not out.loss.requires_grad


def test_module(impl):
    inputs = make()
    args = [inputs[name] for name in TENSORS]
    module = CRDLoss(beta=30.0, impl=impl)
    assert torch.equal(module(*args).loss, crd_loss(*args, beta=30.0, impl=impl).loss)
    assert torch.equal(module(*args, beta=2.0).loss, crd_loss(*args, beta=2.0, impl=impl).loss)
    assert "beta=30.0" in repr(module)
    with pytest.raises(TypeError, match="betta"):
        CRDLoss(betta=1.0)
