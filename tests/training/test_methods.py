"""The gradient of each method besides CRD, at every micro-batch, and of the penalty on norms."""

import crd_kernels
import pytest
import torch

from crd_fast.schema import LossConfig
from crd_fast.seeds import seeded_noise
from crd_fast.train.pairs import Pairs
from tests.training.conftest import METHODS, SAMPLES, SHAPE, gradients


def by_the_kernels_loss(setting, method, weights, **settings):
    """The gradient of `crd_kernels`' own loss of all pairs in one batch."""
    model, all_weights, pairs, latents, embeddings, empty = setting
    loss = LossConfig(**{"kl_beta": 0.1, "guidance_scale": 4.5, "method": method} | settings)
    x0, noise = latents[pairs.sample].double(), seeded_noise(pairs.seed, SHAPE).double()
    x = torch.lerp(latents[pairs.sample], noise.float(), pairs.sigma.view(-1, 1, 1, 1))
    conditional = {"states": embeddings["states"][pairs.prompt]}
    with torch.no_grad():
        with all_weights.use("old"):
            old = model.velocity(x, pairs.sigma, conditional)
        with all_weights.use("reference"):
            cond = model.velocity(x, pairs.sigma, conditional)
            uncond = model.velocity(x, pairs.sigma, {"states": empty["states"].expand(len(pairs), -1)})
    about = {"ref_uncond": uncond, "guidance_scale": loss.guidance_scale, "kl_beta": loss.kl_beta}
    about |= {"kl_weight": weights, "impl": "reference"}
    policy = model.velocity(x, pairs.sigma, conditional)
    if method == "nft":
        about |= {"beta": loss.beta, "adaptive_weighting": loss.adaptive_weighting}
        out = crd_kernels.nft_loss(policy, old, cond, x0, noise, pairs.advantage, pairs.sigma, **about)
    elif method == "awm":
        held = {"ema": old, "ema_kl_beta": loss.old_kl_beta} if loss.old_kl_beta else {}
        ratio = {"old": old, "clip_range": loss.clip_range} if loss.clip_range else {}
        about |= {"sigma": pairs.sigma, "weighting": loss.weighting}
        out = crd_kernels.awm_loss(policy, cond, x0, noise, pairs.advantage, **about, **held, **ratio)
    elif method == "dpo":
        loss_of_all = dpo_by_autograd(policy, old, cond, uncond, x0, noise, pairs, weights, loss)
        model.transformer.zero_grad(set_to_none=True)
        loss_of_all.backward()
        return float(loss_of_all.detach()), torch.cat([p.grad.flatten() for p in all_weights.trained()])
    else:
        weight = (pairs.advantage.clamp(-5, 5) + 5) / 10
        out = crd_kernels.awm_loss(policy, cond, x0, noise, weight, **about)
    model.transformer.zero_grad(set_to_none=True)
    out.loss.backward()
    return float(out.loss.detach()), torch.cat([p.grad.flatten() for p in all_weights.trained()])


def dpo_by_autograd(policy, old, cond, uncond, x0, noise, pairs, weights, loss):
    """The formula, pair by pair; the reference is guided, but for the preferences it is old."""

    def error(velocity, i):
        return (velocity[i] - (noise[i] - x0[i])).square().mean()

    terms = []
    for group in pairs.group.unique():
        rising = sorted((pairs.group == group).nonzero().flatten().tolist(), key=lambda i: pairs.advantage[i])
        for worse, better in zip(rising[: len(rising) // 2], reversed(rising)):
            gap = error(policy, better) - error(old, better) - error(policy, worse) + error(old, worse)
            equal = pairs.advantage[worse] == pairs.advantage[better]
            terms.append(0 * gap if equal else -torch.nn.functional.logsigmoid(-loss.beta / 2 * gap))
    reference = uncond + loss.guidance_scale * (cond - uncond)
    kl = (policy - reference).square().flatten(1).mean(1)
    return torch.stack(terms).mean() + loss.kl_beta * (weights.double() * kl).mean()


DPO = {"dpo": {"method": "dpo", "beta": 20.0}}


@pytest.mark.parametrize("anchored", ["all", "some"])
@pytest.mark.parametrize("name", METHODS | DPO)
def test_every_method_is_the_kernels_loss_at_any_micro_batch(setting, name, anchored):
    pairs, settings = setting[2], {"beta": 1.0} | (METHODS | DPO)[name]
    if anchored == "some":
        pairs = Pairs(**vars(pairs) | {"anchor": (torch.arange(len(pairs)) % 3 == 0).float() * 3})
    given = {key: value for key, value in settings.items() if key != "method"}
    loss, expected = by_the_kernels_loss(setting, settings["method"], pairs.anchor, **given)
    assert expected.norm() > 1e-4
    for micro_batch in (1, 4, SAMPLES, 100):
        metrics, gradient = gradients(setting, micro_batch, pairs, **settings)
        assert metrics["policy_loss"] + metrics["kl_loss"] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_preferences_need_rewards_that_differ(setting):
    model, weights, pairs, *others = setting
    first, equal = pairs.group == 0, pairs.advantage.clone()
    equal[first] = equal[first].sign()  # some pairs of it are alike
    assert 1 < len(equal[first].unique()) < SAMPLES
    setting = model, weights, Pairs(**vars(pairs) | {"advantage": equal}), *others
    loss, expected = by_the_kernels_loss(setting, "dpo", pairs.anchor, beta=20.0)
    metrics, gradient = gradients(setting, 4, **DPO["dpo"])
    assert metrics["policy_loss"] + metrics["kl_loss"] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)
    alike = Pairs(**vars(pairs) | {"advantage": torch.zeros_like(equal)})
    _, nothing = gradients(setting, 4, alike, **DPO["dpo"], kl_beta=0.0)
    assert not nothing.any()


@pytest.mark.parametrize("name", ["flow matching", "dpo"])
def test_what_no_reward_scored_moves_nothing(setting, name):
    pairs, settings = setting[2], (METHODS | DPO)[name] | {"kl_beta": 0.0}
    scored = torch.arange(len(pairs)) % 3 != 1  # of each group four of six
    without = Pairs(**vars(pairs) | {"scored": scored, "advantage": pairs.advantage * scored})
    _, of_the_others = gradients(setting, 4, pairs[scored], **settings)
    assert of_the_others.norm() > 1e-4
    for micro_batch in (1, SAMPLES, 100):
        _, gradient = gradients(setting, micro_batch, without, **settings)
        torch.testing.assert_close(gradient, of_the_others * 4 / 6, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_uncoupled_methods_run_the_policy_once_and_old_where_they_need_it(setting, name):
    model, _, pairs, *_ = setting
    metrics, _ = gradients(setting, 1, **METHODS[name])
    old = name in ("nft", "nft plain", "awm clipped", "awm held")
    reference = 0 if name == "awm held" else 1 if name == "nft plain" else 2
    assert model.samples_run == {True: len(pairs), False: (old + reference) * len(pairs)}
    assert ("old_deviation" in metrics) == old
    assert ("implicit_reward_mean" in metrics) == (name == "awm clipped")


@pytest.mark.parametrize("method", ["crd", "nft", "awm"])
@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_the_penalty_on_norms_adds_the_gradient_of_its_formula(setting, method, micro_batch):
    model, weights, pairs, latents, embeddings, _ = setting
    pairs = Pairs(**vars(pairs) | {"anchor": (torch.arange(len(pairs)) % 3 == 0).float() * 3})
    setting = model, weights, pairs, *setting[3:]
    with torch.no_grad():  # some are longer than the reference's and some are not
        for parameter in model.transformer[-1].parameters():
            parameter.mul_(0.55)
    _, without = gradients(setting, micro_batch, method=method)
    metrics, gradient = gradients(setting, micro_batch, method=method, norm_penalty=0.7)

    x0, noise = latents[pairs.sample], seeded_noise(pairs.seed, SHAPE)
    x = torch.lerp(x0, noise, pairs.sigma.view(-1, 1, 1, 1))
    conditional = {"states": embeddings["states"][pairs.prompt]}
    policy = model.velocity(x, pairs.sigma, conditional)
    with torch.no_grad(), weights.use("reference"):
        reference = model.velocity(x, pairs.sigma, conditional)
    ratio = policy.flatten(1).norm(dim=1) ** 2 / reference.flatten(1).norm(dim=1) ** 2
    assert (ratio > 1.01).any() and (ratio < 0.99).any()
    loss = 0.7 * (pairs.anchor * torch.relu(ratio - 1)).mean()
    model.transformer.zero_grad(set_to_none=True)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in weights.trained()])
    torch.testing.assert_close(gradient - without, expected, rtol=1e-5, atol=1e-9)
    assert metrics["norm_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert metrics["norm_ratio"] == pytest.approx(float((pairs.anchor * ratio).mean().detach()), rel=1e-6)


def test_the_penalty_has_its_metrics_in_steps_without_an_anchored_pair(setting):
    pairs = Pairs(**vars(setting[2]) | {"anchor": torch.zeros(len(setting[2]))})
    metrics, _ = gradients(setting, 4, pairs, norm_penalty=0.7)
    assert metrics["norm_loss"] == metrics["norm_ratio"] == 0


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_the_penalty_does_nothing_where_rounding_alone_makes_the_policy_longer(
    setting, monkeypatch, micro_batch
):
    model, velocity = setting[0], setting[0].velocity
    with torch.no_grad(), setting[1].use("reference"):
        of_base = [parameter.clone() for parameter in model.transformer.parameters()]
    for parameter, value in zip(setting[1].trained(), of_base):
        parameter.data.copy_(value)
    _, without = gradients(setting, micro_batch)

    def rounded(x, sigma, embeddings):  # as by the shape of a batch
        return velocity(x, sigma, embeddings) * (1 + 1e-5 * torch.is_grad_enabled())

    monkeypatch.setattr(model, "velocity", rounded)
    metrics, gradient = gradients(setting, micro_batch, norm_penalty=0.7)
    assert metrics["norm_loss"] == 0 and metrics["norm_ratio"] == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(gradient, without, rtol=1e-2, atol=1e-5)
