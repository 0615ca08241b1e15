"""center on its own: ragged groups, partial steps, anchors, and how a micro-batching trainer uses it."""

import math

import numpy
import pytest
import torch
from crd_kernels import Stats, center, crd_loss, measure, velocity_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_oracle import INTERPRETING, crd, make, relative_error

NAMES = ("old", "ref_cond", "x0", "noise")


def measured(inputs, impl="reference", rows=slice(None), **keywords):
    tensors = [inputs[name][rows] for name in ("policy", *NAMES)]
    return measure(*tensors, ref_uncond=inputs["ref_uncond"][rows], impl=impl, **keywords)


@settings(
    max_examples=10 if INTERPRETING else 30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    group=st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 3), min_size=1, max_size=12),
    temperature=st.sampled_from([math.inf, 0.3]),
    loss_type=st.sampled_from(["mse", "bce"]),
)
def test_ragged_groups(impl, group, temperature, loss_type):
    inputs = make(batch=len(group), shape=(5,), groups=group)
    keywords = {"temperature": temperature, "loss_type": loss_type}
    coefficients = center(measured(inputs, impl), inputs["advantage"], inputs["group"], impl=impl, **keywords)
    wanted = crd(inputs, **keywords)
    gradient = velocity_grad(
        inputs["policy"], inputs["ref_cond"], inputs["x0"], inputs["noise"], coefficients, impl=impl
    )
    assert relative_error(coefficients.loss, wanted["loss"]) < 1e-11
    assert relative_error(gradient, wanted["grad"]) < 1e-11


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_give_the_whole_to_the_bit(impl, micro_batch, dtype):
    """measure by micro-batch, cat, center once, velocity_grad by micro-batch == one crd_loss call.

    The reference's sums are torch's, which may round by the shape of the batch.
    """
    batch = 6 if INTERPRETING else 24
    inputs = make(batch=batch, shape=(4, 90, 50), groups=(0, 7, 7), dtype=dtype)
    keywords = {"guidance_scale": 4.5}
    policy = inputs["policy"].clone().requires_grad_()
    whole = crd_loss(
        policy,
        *(inputs[name] for name in (*NAMES, "advantage", "group")),
        ref_uncond=inputs["ref_uncond"],
        impl=impl,
        **keywords,
    )
    whole.loss.backward()

    parts = [slice(i, i + micro_batch) for i in range(0, batch, micro_batch)]
    stats = Stats.cat([measured(inputs, impl, rows, **keywords) for rows in parts])
    coefficients = center(stats, inputs["advantage"], inputs["group"], impl=impl)
    gradients = [
        velocity_grad(
            *(inputs[name][rows] for name in ("policy", "ref_cond", "x0", "noise")),
            coefficients[rows],
            ref_uncond=inputs["ref_uncond"][rows],
            impl=impl,
            **keywords,
        )
        for rows in parts
    ]
    if impl == "reference":
        assert relative_error(coefficients.loss, whole.loss) < 1e-6
        assert relative_error(torch.cat(gradients), policy.grad) < max(1e-6, torch.finfo(dtype).eps)
    else:
        assert coefficients.loss == whole.loss
        assert torch.equal(torch.cat(gradients), policy.grad)
    assert policy.grad.abs().max() > 0


def test_centering_over_the_micro_batch_would_be_seen(impl):
    """The bug that the three steps avoid: centered alone, a sample has no policy gradient at all."""
    inputs = make(batch=6, groups=(0,))
    stats = measured(inputs)
    whole = center(stats, inputs["advantage"], inputs["group"], impl=impl)
    alone = center(stats[2], inputs["advantage"][2:3], inputs["group"][2:3], impl=impl)
    assert whole.c1[2] != 0 and alone.c1[0] == 0


@pytest.mark.parametrize("temperature", [math.inf, 0.5])
def test_group_by_group_adds_up_to_the_whole(impl, temperature):
    inputs = make(batch=11, groups=(4, 4, 1, 9, 1))
    stats, group = measured(inputs), inputs["group"]
    whole = center(stats, inputs["advantage"], group, temperature=temperature, impl=impl)
    losses = []
    for g in group.unique():
        rows = group == g
        part = center(
            stats[rows],
            inputs["advantage"][rows],
            group[rows],
            temperature=temperature,
            denominator=11,
            impl=impl,
        )
        losses.append(part.loss)
        assert relative_error(part.c1, whole.c1[rows]) < 1e-12
        assert relative_error(part.c2, whole.c2[rows]) < 1e-12
    assert relative_error(sum(losses), whole.loss) < 1e-12


def test_kl_weight_multiplies_the_anchor(impl):
    inputs = make()
    stats = measured(inputs)
    weight = torch.tensor([0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 0.5])
    plain = center(stats, inputs["advantage"], inputs["group"], impl=impl)
    got = center(stats, inputs["advantage"], inputs["group"], kl_weight=weight, impl=impl)
    a = inputs["advantage"].clamp(-5, 5) / 10 + 0.5
    wanted = ((1e-4 + a * (0.1 - 1e-4)) * weight * stats.kl).mean()
    assert relative_error(got.kl_loss, wanted) < 1e-12
    assert relative_error(got.c2, plain.c2 * weight) < 1e-12
    assert torch.equal(got.c1, plain.c1) and torch.equal(got.policy_loss, plain.policy_loss)


def test_samples_without_a_reference_have_no_anchor(impl):
    inputs = make()
    without = {**inputs, "ref_cond": None}
    tensors = [without[name] for name in ("policy", *NAMES)]
    stats = Stats.cat([measured(inputs)[:3], measure(*tensors, impl="reference")[3:]])
    coefficients = center(stats, inputs["advantage"], inputs["group"], impl=impl)
    assert (coefficients.c2[:3] > 0).all() and not coefficients.c2[3:].any()
    assert not stats.kl[3:].any() and not stats.old_kl[3:].any()


SETTINGS = [
    {"temperature": t, "loss_type": kind} for t in (math.inf, 0.3, 0.0, 1e-30) for kind in ("mse", "bce")
]


@pytest.mark.parametrize(
    "groups", [(1,), (5, -2, 7, 9, 2**40, -2, 5), tuple(range(60)), (-(2**63), 2**63 - 1)]
)
def test_groups_that_spread_over_blocks(impl, groups):
    """More samples than one block of the GPU's kernel takes, whose groups find together over all of them."""
    inputs = make(batch=101, shape=(3,), groups=groups)
    stats, advantage = measured(inputs), inputs["advantage"]
    for keywords in SETTINGS[:: 3 if INTERPRETING else 1]:
        got = center(stats, advantage, inputs["group"], impl=impl, **keywords)
        wanted = center(stats, advantage, inputs["group"], impl="reference", **keywords)
        for name in ("loss", "policy_loss", "kl_loss", "c1", "c2"):
            assert relative_error(getattr(got, name), getattr(wanted, name)) < 1e-12, name
        if keywords["temperature"] in (math.inf, 0.3):
            assert relative_error(got.loss, crd(inputs, **keywords)["loss"]) < 1e-11


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_every_integer_type(impl, dtype):
    inputs = make(batch=40, shape=(3,), groups=(3, 100, 7))
    stats = measured(inputs)
    got = center(stats, inputs["advantage"], inputs["group"].to(dtype), impl=impl)
    wanted = center(stats, inputs["advantage"], inputs["group"], impl="reference")
    assert relative_error(got.c1, wanted.c1) < 1e-12


@pytest.mark.parametrize("loss_type", ["mse", "bce"])
def test_small_temperatures_reach_their_limit(impl, loss_type):
    """The largest of each group alone, in shares where several are: nothing overflows on the way there."""
    inputs = make(batch=6, shape=(5,), groups=(0, 0, 1))
    inputs["advantage"] = torch.tensor([1.0, 2, 0.5, 2, -1, 0.5], dtype=torch.float64)
    stats = measured(inputs)
    r, a = stats.implicit_reward, inputs["advantage"] / 10 + 0.5
    for temperature in (1e-3, 1e-21, 1e-300):
        keywords = {"temperature": temperature, "loss_type": "mse", "kl_beta": 0}
        got = center(stats, inputs["advantage"], inputs["group"], impl=impl, **keywords)
        terms = 0
        for members, top, low in (([0, 1, 3, 4], [1, 3], [4]), ([2, 5], [2, 5], [2, 5])):
            for chosen in (top, low):
                delta = (r[members] - r[chosen].mean()) - (a[members] - a[chosen].mean())
                terms = terms + (delta**2).sum() / 2
        assert relative_error(got.policy_loss, 5 * terms / 6) < 1e-9
        assert got.kl_loss == 0 and not got.c2.any()


def test_temperature_0_selects_what_is_positive(impl):
    """As the public trainer's weight_temp=0: softmax(a) over a > 0 one way, the plain mean the other."""
    inputs = make(batch=6, shape=(5,), groups=(0, 0, 1))
    inputs["advantage"] = torch.tensor([-9.0, 2, -9, 1, 0.5, -7], dtype=torch.float64)
    stats = measured(inputs)
    r, a = stats.implicit_reward, (inputs["advantage"].clamp(-5, 5) / 10 + 0.5)
    terms = 0
    for members in ([0, 1, 3, 4], [2, 5]):
        p = torch.where(a[members] > 0, a[members].exp(), 0)
        p = p / p.sum() if p.any() else torch.full_like(p, 1 / len(members))
        for weights in (p, torch.full_like(p, 1 / len(members))):
            delta = r[members] - weights @ r[members] - (a[members] - weights @ a[members])
            terms = terms + (delta**2).sum() / 2
    got = center(stats, inputs["advantage"], inputs["group"], temperature=0, impl=impl)
    assert relative_error(got.policy_loss, 5 * terms / 6) < 1e-11


def test_centering_is_linear_in_the_samples():
    """Twice the samples, twice the operators at most: no comparison of everybody with everybody."""
    counts = []
    for batch in (2000, 20000):
        inputs = make(batch=batch, shape=(1,), groups=tuple(range(batch // 8)))
        stats = measured(inputs)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            center(stats, inputs["advantage"], inputs["group"], temperature=0.5, impl="reference")
        events = [event for event in profile.function_events if event.name.startswith("aten::")]
        counts.append((len(events), max(event.cpu_memory_usage for event in events) / batch))
    (few, small), (many, large) = counts
    assert many <= few + 5 and large <= 1.1 * small


def test_an_anchor_of_strength_0_needs_no_other_setting(impl):
    inputs = make()
    got = center(measured(inputs), inputs["advantage"], inputs["group"], kl_beta=0, impl=impl)
    assert got.kl_loss == 0 and not got.c2.any() and got.c1.any()
    with pytest.raises(ValueError, match="kl_min"):
        center(measured(inputs), inputs["advantage"], inputs["group"], kl_beta=1e-5, impl=impl)


def test_iteration_goes_sample_by_sample(impl):
    inputs = make()
    stats = measured(inputs)
    coefficients = center(stats, inputs["advantage"], inputs["group"], impl=impl)
    assert [len(one) for one in stats] == [1] * 7 and [len(one) for one in coefficients] == [1] * 7
    assert torch.equal(torch.cat([one.kl for one in stats]), stats.kl)
    assert torch.equal(torch.cat([one.c1 for one in coefficients]), coefficients.c1)
    for wrong in (7, -8):
        with pytest.raises(IndexError, match=rf"index: expected a sample of 7, got {wrong}"):
            stats[wrong]
        with pytest.raises(IndexError, match=rf"index: expected a sample of 7, got {wrong}"):
            coefficients[wrong]


def test_large_advantages_do_not_overflow_the_softmax(impl):
    inputs = make() | {"advantage": torch.tensor([1e30, -1e30, math.inf, 0, 1, 2, 3])}
    coefficients = center(measured(inputs), inputs["advantage"], inputs["group"], temperature=1e-3, impl=impl)
    assert coefficients.loss.isfinite() and coefficients.c1.isfinite().all()


def test_stats_select_and_join():
    stats = measured(make())
    again = Stats.cat([stats[0], stats[1:4], stats[numpy.int64(-3)], stats[[5, 6]]])
    for name in ("implicit_reward", "policy_scale", "kl", "old_deviation"):
        assert torch.equal(getattr(again, name), getattr(stats, name))
    assert len(stats) == 7 and len(stats[2:4]) == 2 and again.n == 144
    with pytest.raises(ValueError, match="parts"):
        Stats.cat([])
    with pytest.raises(ValueError, match="parts"):
        Stats.cat([stats, measured(make(shape=(5,)))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_of_any_dtype(impl, dtype):
    """`Stats.to` makes them; what comes of them is in float32 then, or in float64."""
    x = make(batch=64, dtype=torch.float32)
    stats = measure(*(x[name] for name in ("policy", "old", "ref_cond", "x0", "noise")), impl=impl)
    wide = center(stats.to(dtype).to(torch.float64), x["advantage"], x["group"], impl=impl)
    found = center(stats.to(dtype), x["advantage"], x["group"], impl=impl)
    assert found.c1.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name in ("loss", "policy_loss", "kl_loss", "c1", "c2"):
        assert relative_error(getattr(found, name), getattr(wide, name)) < 1e-6
