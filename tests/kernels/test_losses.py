"""The losses beside CRD against the oracle in float64, value and gradient."""

import inspect
import math

import loss_oracle
import pytest
import torch
from crd_kernels import (
    Stats,
    awm_coefficients,
    awm_loss,
    diffusion_dpo_loss,
    flow_matching_loss,
    implicit_reward,
    measure,
    nft_coefficients,
    nft_loss,
    velocity_grad,
)
from kernel_oracle import INTERPRETING, make, relative_error


def case(name, dtype=torch.float64, shape=(3, 5, 7)):
    """Fused loss, its definition, positional tensors, keywords; all cases by name for None."""
    x = make(batch=6, shape=shape, dtype=dtype)
    sigma = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    guidance = {"ref_uncond": x["ref_uncond"], "guidance_scale": 4.5}
    policy, old, cond, x0, noise, advantage = (
        x[k] for k in ("policy", "old", "ref_cond", "x0", "noise", "advantage")
    )
    nft = (nft_loss, loss_oracle.nft, [policy, old, cond, x0, noise, advantage, sigma])
    awm = (awm_loss, loss_oracle.awm, [policy, cond, x0, noise, advantage])
    dpo = (diffusion_dpo_loss, loss_oracle.dpo, [policy, old, x0, noise])
    flow_matching = (flow_matching_loss, loss_oracle.flow_matching, [policy, x0, noise])
    mask = (x["ref_uncond"].reshape(6, -1, shape[-1])[:, :1] > 0).reshape(
        6, *[1] * (len(shape) - 1), shape[-1]
    )
    mask[..., 0] = True  # of every sample something is left
    cases = {
        "flow_matching": (*flow_matching, {}),
        "flow_matching_weighted": (*flow_matching, {"weight": advantage}),
        "awm": (*awm, {"kl_beta": 0.2, "advantage_clip": 2.0, **guidance}),
        "awm_without_reference": (*awm[:2], [policy, None, x0, noise, advantage], {}),
        "awm_off_policy": (*awm, {"old": old, **guidance, "kl_beta": 0.2}),
        "awm_clipped": (*awm, {"old": old, "clip_range": 0.02}),
        "awm_asymmetric": (*awm, {"old": old, "clip_range": (0.01, 0.3)}),
        "awm_old_error": (*awm, {"old_error": x["advantage"].abs() + 0.5, "clip_range": 0.3}),
        "awm_t": (*awm, {"weighting": "t", "sigma": sigma, "old": old}),
        "awm_t2": (*awm, {"weighting": "t2", "sigma": sigma}),
        "awm_huber": (*awm, {"weighting": "huber", "sigma": sigma, "old": old, "clip_range": 0.01}),
        "awm_ghuber": (*awm, {"weighting": "ghuber", "sigma": sigma, "old_error": x["advantage"].abs()}),
        "awm_ema": (*awm, {"ema": old, "ema_kl_beta": 0.7, "kl_beta": 0.1, "kl_weight": sigma}),
        "awm_ema_is_old": (*awm, {"ema": old, "old": old, "ema_kl_beta": 0.7, "denominator": 9.0}),
        "awm_masked": (*awm, {"old": old, "kl_beta": 0.2, "mask": mask, "ema": old, "ema_kl_beta": 0.1}),
        "nft": (*nft, {"kl_beta": 0.3, **guidance}),
        "nft_masked": (*nft, {"kl_beta": 0.3, "mask": mask, "beta": 0.5}),
        "nft_weighted": (*nft, {"kl_beta": 0.3, "kl_weight": sigma, "denominator": 48.0, **guidance}),
        "dpo_masked": (*dpo, {"beta": 7.0, "mask": mask}),
        "flow_matching_masked": (*flow_matching, {"mask": mask, "weight": advantage}),
        "nft_small_beta": (*nft, {"beta": 0.1, "advantage_clip": 2.0}),
        "nft_plain": (*nft, {"beta": 2.0, "adaptive_weighting": False}),
        "dpo": (*dpo, {"beta": 7.0}),
    }
    return cases[name] if name else cases


NAMES = list(case(None))


def wanted_of(fused, definition, tensors, keywords):
    """What the oracle says of a case, in float64."""
    given = dict(zip(inspect.signature(fused).parameters, tensors)) | keywords
    exact = {k: v.double() for k, v in given.items() if isinstance(v, torch.Tensor)}
    return definition(loss_oracle.Case(exact, {k: v for k, v in keywords.items() if k not in exact}))


def both(name, impl, dtype, shape=(3, 5, 7)):
    fused, definition, tensors, keywords = case(name, dtype, shape)
    policy = tensors[0].clone().requires_grad_()
    out = fused(policy, *tensors[1:], impl=impl, **keywords)
    out.loss.backward()
    return out, policy.grad, wanted_of(fused, definition, tensors, keywords)


@pytest.mark.parametrize("name", NAMES)
def test_float64(impl, name):
    out, gradient, wanted = both(name, impl, torch.float64)
    assert relative_error(gradient, wanted["grad"]) < 1e-10
    for key in ("loss", "error", "kl", "old_deviation"):
        assert relative_error(getattr(out, key), wanted[key]) < 1e-11, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs(impl, name, dtype):
    out, gradient, wanted = both(name, impl, dtype, shape=(500,))
    assert relative_error(out.loss, wanted["loss"]) < 2e-5
    assert relative_error(gradient, wanted["grad"]) < max(2e-5, torch.finfo(dtype).eps)
    assert not out.error.requires_grad and gradient.dtype == dtype


def test_awm_with_equal_policy_and_old_has_the_gradient_of_its_on_policy_form(impl):
    x = make(batch=4)
    gradients = []
    for old in (None, x["old"]):
        policy = x["old"].clone().requires_grad_()
        awm_loss(policy, None, x["x0"], x["noise"], x["advantage"], old=old, impl=impl).loss.backward()
        gradients.append(policy.grad)
    assert relative_error(*gradients) < 1e-11


def test_awm_clips_some_samples_and_not_others():
    moved = wanted_of(*case("awm_clipped"))["grad"].flatten(1).abs().sum(1) > 0
    assert moved.any() and not moved.all()


def test_equal_policy_and_old_leave_nft_the_flow_matching_gradient_of_its_advantage(impl):
    """At policy == old both branches are the policy: the gradient is that of (2 a - 1) weighted matching."""
    x = make(batch=4)
    policy = x["old"].clone().requires_grad_()
    sigma = torch.ones(4, dtype=torch.float64)
    out = nft_loss(policy, x["old"], None, x["x0"], x["noise"], x["advantage"], sigma, impl=impl)
    out.loss.backward()
    target = x["noise"] - x["x0"]
    scale = (x["old"] - target).abs().flatten(1).mean(1)
    weight = 5 * 2 * (x["advantage"].clamp(-5, 5) / 10) / scale
    again = x["old"].clone().requires_grad_()
    flow_matching_loss(again, x["x0"], x["noise"], weight=weight, impl=impl).loss.backward()
    assert relative_error(policy.grad, again.grad) < 1e-11


def test_implicit_reward_is_differentiable_per_sample(impl):
    x = make()
    policy = x["policy"].clone().requires_grad_()
    reward = implicit_reward(policy, x["old"], x["x0"], x["noise"], impl=impl)
    weight = torch.randn(7, dtype=torch.float64)
    (weight * reward).sum().backward()
    exact = x["policy"].clone().requires_grad_()
    target, mean = x["noise"] - x["x0"], lambda v: v.flatten(1).mean(1)
    scale = mean((exact - target).detach().abs())
    wanted = (
        mean((x["old"] - target) ** 2) / mean((x["old"] - target).abs()) - mean((exact - target) ** 2) / scale
    )
    (weight * wanted).sum().backward()
    assert relative_error(reward, wanted) < 1e-11
    assert relative_error(policy.grad, exact.grad) < 1e-11


@pytest.mark.skipif(INTERPRETING, reason="a seed takes the same way through every loss")
@pytest.mark.parametrize("name", ["flow_matching", "awm", "nft", "dpo"])
def test_noise_by_seed(impl, name):
    from crd_kernels.noise.philox import normal

    fused, _, tensors, keywords = case(name, torch.float32)
    where = {"flow_matching": 2, "awm": 3, "nft": 4, "dpo": 3}[name]
    seed = torch.arange(6)
    tensors[where] = normal(seed, tensors[0].shape)
    given = fused(*tensors, impl=impl, **keywords).loss
    tensors[where] = None
    assert relative_error(fused(*tensors, seed=seed, impl=impl, **keywords).loss, given) < 1e-5


def test_dpo_takes_errors_without_bound(impl):
    """A pair that is certain costs nothing, one that is certainly wrong without end."""
    x = make(batch=4)
    finite = diffusion_dpo_loss(x["policy"][::2], x["old"][::2], x["x0"][::2], x["noise"][::2], impl=impl)
    for sample, wanted in ((3, math.inf), (1, finite.loss.item() / 2)):
        old = x["old"].clone()
        old[sample, 0] = math.inf
        loss = diffusion_dpo_loss(x["policy"], old, x["x0"], x["noise"], impl=impl).loss
        assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_nan_reaches_every_loss(impl):
    for name in ("flow_matching", "awm", "nft", "dpo"):
        fused, _, tensors, keywords = case(name)
        tensors[0] = tensors[0].clone()
        tensors[0].view(-1)[5] = math.nan
        assert fused(*tensors, impl=impl, **keywords).loss.isnan()


def test_one_element_that_is_not_a_number_leaves_the_others_their_gradient(impl):
    """Its error is NaN, and what that error is multiplied by is not."""
    x = make(batch=3)
    policy = x["policy"].clone()
    policy.view(-1)[5] = math.nan
    policy.requires_grad_()
    args = [x[k] for k in ("ref_cond", "x0", "noise", "advantage")]
    awm_loss(policy, *args, impl=impl).loss.backward()
    assert policy.grad.isnan().sum() == 1


def test_on_policy_and_off_policy_with_the_errors_of_before(impl):
    """The errors that awm_loss returned stand in for a forward of `old`."""
    x = make(batch=4)
    args = [x[k] for k in ("ref_cond", "x0", "noise", "advantage")]
    before = awm_loss(x["old"], *args, impl=impl).error
    gradients = []
    for keywords in ({"old": x["old"]}, {"old_error": before}):
        policy = x["policy"].clone().requires_grad_()
        awm_loss(policy, *args, clip_range=0.2, impl=impl, **keywords).loss.backward()
        gradients.append(policy.grad)
    assert relative_error(*gradients) < 1e-11


def test_bad_settings_of_awm(impl):
    x, v = torch.zeros(3, 4), torch.zeros(3)
    for keywords, message in (
        ({"weighting": "t"}, "sigma: expected a tensor, got NoneType"),
        (
            {"weighting": "time"},
            "weighting: expected one of 'uniform', 't', 't2', 'huber', 'ghuber', got 'time'",
        ),
        ({"clip_range": 0.2}, r"clip_range: expected None without old or old_error, got 0\.2"),
        ({"ema_kl_beta": 0.1}, r"ema: expected a tensor because ema_kl_beta is 0\.1, got None"),
        ({"ema_kl_beta": -3.0}, r"ema_kl_beta: expected a number >= 0, got -3\.0"),
        ({"ema": x[:2], "ema_kl_beta": 0.1}, r"ema: expected shape \(3, 4\), got \(2, 4\)"),
        ({"ema": [0.0], "ema_kl_beta": 0.1}, "ema: expected a tensor, got list"),
        ({"clip_range": (0.1, -1.0), "old": x}, "clip_range: expected a number > 0, got -1.0"),
        (
            {"clip_range": (1.0, 2.0, 3.0), "old": x},
            r"clip_range: expected a number or \(below, above\), got 3",
        ),
        ({"old": x, "ema": x + 1}, "old: expected None or `ema` itself because ema is given"),
        ({"old": x, "old_error": v}, "old_error: expected None because old is given"),
        ({"old_error": torch.zeros(2)}, r"old_error: expected shape \(3,\), got \(2,\)"),
        ({"kl_weight": torch.zeros(2)}, r"kl_weight: expected shape \(3,\), got \(2,\)"),
        ({"denominator": 0}, "denominator: expected a number > 0, got 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            awm_loss(x, None, x, x, v, impl=impl, **keywords)


def test_bad_input(impl):
    x = torch.zeros(3, 4)
    v = torch.zeros(3)
    with pytest.raises(ValueError, match=r"policy: expected an even number of samples \(pairs\), got 3"):
        diffusion_dpo_loss(x, x, x, x, impl=impl)
    with pytest.raises(ValueError, match=r"reference: expected shape \(4, 4\), got \(3, 4\)"):
        diffusion_dpo_loss(torch.zeros(4, 4), x, torch.zeros(4, 4), torch.zeros(4, 4), impl=impl)
    with pytest.raises(ValueError, match=r"sigma: expected shape \(3,\), got \(2,\)"):
        nft_loss(x, x, None, x, x, v, torch.zeros(2), impl=impl)
    with pytest.raises(ValueError, match=r"beta: expected a number > 0, got 0"):
        nft_loss(x, x, None, x, x, v, v, beta=0, impl=impl)
    with pytest.raises(TypeError, match=r"old: expected a tensor, got NoneType"):
        nft_loss(x, None, None, x, x, v, v, impl=impl)
    with pytest.raises(ValueError, match=r"advantage: expected shape \(3,\), got \(4,\)"):
        awm_loss(x, None, x, x, torch.zeros(4), impl=impl)
    with pytest.raises(TypeError, match=r"x0: expected a tensor, got NoneType"):
        flow_matching_loss(x, None, x, impl=impl)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3,\), got \(2,\)"):
        flow_matching_loss(x, x, x, weight=torch.zeros(2), impl=impl)
    with pytest.raises(ValueError, match=r"policy: expected shape \(batch, ...\) of rank >= 2, got \(\)"):
        flow_matching_loss(torch.tensor(1.0), x, x, weight=v, impl=impl)
    with pytest.raises(
        ValueError, match=r"ref_uncond: expected a tensor because guidance_scale is 2.0, got None"
    ):
        awm_loss(x, x, x, x, v, guidance_scale=2.0, impl=impl)


STEPS = ("nft", "nft_masked", "nft_weighted", "nft_small_beta", "nft_plain", "awm", "awm_off_policy")
STEPS += ("awm_asymmetric", "awm_huber", "awm_ema_is_old")


def in_steps(name, impl, micro_batch):
    """Loss and gradient by measure, the coefficients of all, and velocity_grad, in micro-batches."""
    _, _, tensors, keywords = case(name)
    old = keywords.pop("old", None)
    keywords.pop("ema", None)
    if name.startswith("nft"):
        policy, old, cond, x0, noise, advantage, keywords["sigma"] = tensors
        of_stats, about = nft_coefficients, {"mix": keywords.get("beta", 1.0)}
        about["adaptive_weighting"] = keywords.get("adaptive_weighting", True)
    else:
        policy, cond, x0, noise, advantage = tensors
        of_stats, about = awm_coefficients, {"adaptive_weighting": False}
        keywords["off_policy"] = old is not None
        old = policy if old is None else old
    uncond, mask = keywords.pop("ref_uncond", None), keywords.pop("mask", None)
    scale = keywords.pop("guidance_scale", 1.0)
    chunks = [slice(i, i + micro_batch) for i in range(0, len(policy), micro_batch)]

    def latents(chunk):
        both = {"ref_uncond": uncond, "mask": mask}
        both = {key: None if value is None else value[chunk] for key, value in both.items()}
        return both | {"guidance_scale": scale, "impl": impl}

    parts = [measure(*(t[c] for t in (policy, old, cond, x0, noise)), **about, **latents(c)) for c in chunks]
    stats = Stats.cat(parts)
    kept = stats.table.clone()
    found = of_stats(stats, advantage, impl=impl, **keywords)
    assert torch.equal(stats.table, kept)
    gradient = [
        velocity_grad(*(t[c] for t in (policy, cond, x0, noise)), found[c], old=old[c], **latents(c))
        for c in chunks
    ]
    return found, torch.cat(gradient)


@pytest.mark.parametrize("name", STEPS)
def test_the_three_steps_at_any_micro_batch_are_the_loss(impl, name):
    out, gradient, _ = both(name, impl, torch.float64)
    for micro_batch in (1, 4, 6):
        found, stepped = in_steps(name, impl, micro_batch)
        assert relative_error(found.loss, out.loss.detach()) < 1e-12
        assert relative_error(found.policy_loss + found.kl_loss, found.loss) < 1e-12
        assert relative_error(stepped, gradient) < 1e-12


def test_what_the_steps_refuse(impl):
    found, _ = in_steps("nft", impl, 6)
    x = make(batch=6, shape=(3, 5, 7))
    with pytest.raises(TypeError, match="old: expected a tensor"):
        velocity_grad(x["policy"], x["ref_cond"], x["x0"], x["noise"], found, impl=impl)
    stats = measure(*(x[k] for k in ("policy", "old", "ref_cond", "x0", "noise")), impl=impl)
    with pytest.raises(ValueError, match="clip_range: expected None without off_policy"):
        awm_coefficients(stats, x["advantage"], clip_range=0.1, impl=impl)
    with pytest.raises(TypeError, match="ema_kl_beta: expected a number, got NoneType"):
        awm_coefficients(stats, x["advantage"], ema_kl_beta=None, impl=impl)
    with pytest.raises(TypeError, match="stats: expected a Stats, got Tensor"):
        awm_coefficients(stats.table, x["advantage"], impl=impl)
    with pytest.raises(ValueError, match=r"sigma: expected shape \(6,\)"):
        nft_coefficients(stats, x["advantage"], x["advantage"][:3], impl=impl)
    with pytest.raises(TypeError, match="sigma"):
        awm_coefficients(stats, x["advantage"], weighting="t", impl=impl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_take_statistics_of_any_dtype(impl, dtype):
    """As `center` does: what comes of them is in float32."""
    x = make(batch=64, dtype=torch.float32)
    stats = measure(*(x[k] for k in ("policy", "old", "ref_cond", "x0", "noise")), mix=0.5, impl=impl)
    a, sigma = x["advantage"], x["advantage"].sigmoid()
    given = stats.to(dtype), stats.to(dtype).to(torch.float64)
    for found, wide in (
        [nft_coefficients(s, a, sigma, beta=0.5, impl=impl) for s in given],
        [awm_coefficients(s, a, kl_beta=0.1, impl=impl) for s in given],
    ):
        assert found.c1.dtype == torch.float32
        for name in ("loss", "policy_loss", "kl_loss", "c1", "c2"):
            assert relative_error(getattr(found, name), getattr(wide, name)) < 1e-6
