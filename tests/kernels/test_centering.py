"""center on its own: ragged groups, partial steps, anchors, and how a micro-batching trainer uses it."""

import math

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
    """measure by micro-batch, cat, center once, velocity_grad by micro-batch == one crd_loss call."""
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


def test_many_samples_in_blocks(monkeypatch):
    """The comparison matrix is cut into blocks of rows; the cut must not show."""
    from crd_kernels.centering import groups

    inputs = make(batch=37, shape=(3,), groups=(0, 1, 2, 1, 0, 5))
    stats = measured(inputs)
    whole = center(stats, inputs["advantage"], inputs["group"], temperature=0.5, impl="reference")
    monkeypatch.setattr(groups, "BLOCK", 100)
    blocks = center(stats, inputs["advantage"], inputs["group"], temperature=0.5, impl="reference")
    assert torch.equal(whole.c1, blocks.c1) and torch.equal(whole.loss, blocks.loss)


def test_large_advantages_do_not_overflow_the_softmax(impl):
    inputs = make() | {"advantage": torch.tensor([1e30, -1e30, math.inf, 0, 1, 2, 3])}
    coefficients = center(measured(inputs), inputs["advantage"], inputs["group"], temperature=1e-3, impl=impl)
    assert coefficients.loss.isfinite() and coefficients.c1.isfinite().all()


def test_stats_select_and_join():
    stats = measured(make())
    again = Stats.cat([stats[0], stats[1:4], stats[-3], stats[[5, 6]]])
    for name in ("implicit_reward", "policy_scale", "kl", "old_deviation"):
        assert torch.equal(getattr(again, name), getattr(stats, name))
    assert len(stats) == 7 and len(stats[2:4]) == 2 and again.n == 144
    with pytest.raises(ValueError, match="parts"):
        Stats.cat([])
    with pytest.raises(ValueError, match="parts"):
        Stats.cat([stats, measured(make(shape=(5,)))])
