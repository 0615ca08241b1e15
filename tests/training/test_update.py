"""One optimizer step: exact at every micro-batch, against autograd, with no forward too many."""

import itertools
import math
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from crd_fast.errors import UserError
from crd_fast.ranks import Ranks
from crd_fast.run.observer import Observer, Observers
from crd_fast.seeds import seed_table, seeded_noise
from crd_fast.train.micro_batch import decoded
from crd_fast.train.objectives import deviation
from crd_fast.train.pairs import Pairs
from crd_fast.train.signal import Signal
from tests.training.conftest import NO_MEMORY, PROMPTS, SAMPLES, SHAPE, TIMESTEPS, gradients


def autograd_oracle(setting, beta=5.0, kl_beta=0.1, kl_min=1e-4, guidance=4.5, clip=5.0, size=SAMPLES):
    """The loss's formulas for all pairs at once, written out, differentiated by autograd.

    size: how many pairs in a row are centered together, as a group of the setting is; None: nothing is.
    """
    model, weights, pairs, latents, embeddings, empty = setting
    x0 = latents[pairs.sample].double()
    noise = seeded_noise(pairs.seed, SHAPE).double()
    sigma = pairs.sigma.view(-1, 1, 1, 1)
    x = torch.lerp(latents[pairs.sample], noise.float(), sigma)
    conditional = {"states": embeddings["states"][pairs.prompt]}
    unconditional = {"states": empty["states"].expand(len(pairs), -1)}
    with torch.no_grad():
        with weights.use("old"):
            old = model.velocity(x, pairs.sigma, conditional).double()
        with weights.use("reference"):
            cond = model.velocity(x, pairs.sigma, conditional).double()
            uncond = model.velocity(x, pairs.sigma, unconditional).double()
    policy = model.velocity(x, pairs.sigma, conditional).double()
    reference = uncond + guidance * (cond - uncond)
    target = noise - x0

    def mean(value):
        return value.flatten(1).mean(1)

    def scale(velocity):
        return mean((velocity - target).abs()).clamp(min=1e-5).detach()

    r = -(mean((policy - target) ** 2) / scale(policy) - mean((old - target) ** 2) / scale(old))
    a = (pairs.advantage.double().clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0, 1)
    delta = beta * r - a
    if size is not None:
        together, delta = torch.arange(len(pairs)) // size, []
        for group in together.unique():
            member = together == group
            delta.append(beta * (r[member] - r[member].mean().detach()) - (a[member] - a[member].mean()))
        delta = torch.cat(delta)
    policy_loss = clip / beta * delta.square().mean()
    k = kl_min + a * (kl_beta - kl_min)
    loss = policy_loss + (k * mean((policy - reference) ** 2)).mean()
    model.transformer.zero_grad(set_to_none=True)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in weights.trained()])


@pytest.mark.parametrize("micro_batch", [1, 4, SAMPLES, 2 * SAMPLES, 100])
def test_gradient_is_that_of_the_whole_loss_at_any_micro_batch(setting, micro_batch):
    loss, expected = autograd_oracle(setting)
    metrics, gradient = gradients(setting, micro_batch)
    assert metrics["policy_loss"] + metrics["kl_loss"] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


CENTERING = {  # and how many pairs in a row are centered together
    "prompt": ({}, SAMPLES),
    "batch": ({"centering": "batch"}, 100),
    "batch of a group": ({"centering": "batch", "centering_batch": SAMPLES}, SAMPLES),
    "batch over prompts": ({"centering": "batch", "centering_batch": 9}, 9),
    "batch of one": ({"centering": "batch", "centering_batch": 1}, 1),
    "none": ({"centering": "none"}, None),
}


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
@pytest.mark.parametrize("name", CENTERING)
def test_every_centering_is_its_formula_at_any_micro_batch(setting, name, micro_batch):
    settings, size = CENTERING[name]
    loss, expected = autograd_oracle(setting, size=size)
    metrics, gradient = gradients(setting, micro_batch, **settings)
    assert metrics["policy_loss"] + metrics["kl_loss"] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_a_group_is_the_batch_of_its_size_and_a_batch_of_one_teaches_nothing(setting):
    alone = {"kl_beta": 0.0, "kl_min": 0.0}
    _, prompt = gradients(setting, 4, **alone)
    _, same = gradients(setting, 4, centering="batch", centering_batch=SAMPLES, **alone)
    assert torch.equal(prompt, same)
    _, nothing = gradients(setting, 4, centering="batch", centering_batch=1, **alone)
    assert not nothing.any()


def test_without_centering_the_policy_runs_once_at_any_micro_batch(setting):
    gradients(setting, 1, centering="none")
    assert setting[0].samples_run[True] == len(setting[2])


def test_policy_gradient_at_micro_batch_one_is_not_zero(setting):
    _, gradient = gradients(setting, 1, kl_beta=0.0, kl_min=0.0)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize(
    ("centering", "temperature"),
    [*itertools.product(["prompt", "batch"], [math.inf, 0.5]), ("none", math.inf)],
)
@pytest.mark.parametrize("type", ["mse", "bce"])
def test_micro_batch_does_not_matter_for_any_loss(setting, temperature, centering, type):
    settings = {"temperature": temperature, "centering": centering, "type": type}
    _, whole = gradients(setting, 100, **settings)
    _, split = gradients(setting, 5, **settings)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_out_of_memory_halves_the_micro_batch_and_changes_no_number(setting, monkeypatch, caplog, error):
    wanted_metrics, wanted = gradients(setting, 4)
    model = setting[0]
    velocity = model.velocity

    def small_memory(x, *arguments):
        result = velocity(x, *arguments)
        if len(x) > 4 and torch.is_grad_enabled():
            raise error
        return result

    monkeypatch.setattr(model, "velocity", small_memory)
    metrics, gradient = gradients(setting, 16)
    assert metrics == wanted_metrics and torch.equal(gradient, wanted)
    assert "micro-batch 16, going on with 8" in caplog.text

    monkeypatch.setattr(model, "velocity", raise_out_of_memory)
    with pytest.raises(UserError, match="out of memory at micro-batch 1: CUDA out of memory"):
        gradients(setting, 2)


@pytest.mark.parametrize("kept", ["device", "host"])
@pytest.mark.parametrize("error", [NO_MEMORY[0], NO_MEMORY[1]], ids=["device", "host"])
def test_graphs_that_there_is_no_memory_for_are_kept_no_more(setting, monkeypatch, caplog, kept, error):
    """They are as large in smaller micro-batches; those that are on the host take nothing of the device."""
    _, wanted = gradients(setting, 4)
    model, alive = setting[0], []
    velocity = model.velocity

    def small_memory(x, *arguments):
        result = velocity(x, *arguments)
        if torch.is_grad_enabled():
            alive[:] = [each for each in alive if each() is not None]
            alive.append(weakref.ref(result))
            if len(alive) > 1:
                raise type(error)(*error.args)  # a new one: its traceback holds tensors
        return result

    monkeypatch.setattr(model, "velocity", small_memory)
    _, gradient = gradients(setting, 4, updater={"kept_graphs": kept})
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-10)
    assert caplog.text.count(f"out of memory with train.kept_graphs {kept}, going on without") == 1
    halved = kept == "host" and isinstance(error, torch.OutOfMemoryError)
    assert ("going on with 2" in caplog.text and "going on with 1" in caplog.text) == halved
    assert ("micro-batch" in caplog.text) == halved


def test_a_signal_sees_a_step_that_is_begun_anew_once(setting, monkeypatch):
    pairs = Pairs(**vars(setting[2]) | {"step": (setting[2].sigma < 0.5).long()})
    model, calls = setting[0], Counter()
    velocity = model.velocity

    def third_fails(x, *arguments):
        calls["with gradient"] += torch.is_grad_enabled()
        if calls["with gradient"] == 3:
            calls["with gradient"] += 1
            raise NO_MEMORY[0]
        return velocity(x, *arguments)

    def state(fails):
        signal = Signal(2)
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(model, "velocity", third_fails)
            gradients(setting, SAMPLES, pairs, updater={"signal": signal})
        signal.end_iteration(Ranks())
        return signal.state

    assert state(fails=True) == pytest.approx(state(fails=False), rel=1e-9)
    assert calls["with gradient"] > 3


@pytest.mark.parametrize("size", [2, 4, 9, None])
def test_variances_within_prompts_are_those_of_whole_groups(setting, size):
    batch = {"centering": "batch", "centering_batch": size}
    wanted = gradients(setting, 100, centering="prompt")[0]
    for micro_batch in (1, 4, 100):
        metrics = gradients(setting, micro_batch, **batch)[0]
        for name in ("implicit_variance", "external_variance"):
            assert metrics[name] == pytest.approx(wanted[name], rel=1e-9)


def raise_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_forwards_per_pair(setting):
    model, _, pairs, *_ = setting
    gradients(setting, SAMPLES)
    assert model.samples_run == {True: len(pairs), False: 3 * len(pairs)}  # old, two for the guided reference
    gradients(setting, SAMPLES - 1)
    assert model.samples_run == {True: len(pairs), False: 4 * len(pairs)}  # and the policy to be measured
    gradients(setting, SAMPLES, guidance_scale=1.0)
    assert model.samples_run == {True: len(pairs), False: 2 * len(pairs)}


class Counted(Observer):
    """Rows by set of weights, and how far the step is."""

    def __init__(self):
        self.rows, self.pairs = Counter(), 0

    @contextmanager
    def branch(self, name, rows):
        self.rows[name] += rows
        yield

    def advance(self, count):
        self.pairs += count


@pytest.mark.parametrize("micro_batch", [4, SAMPLES])
def test_observers_are_told_of_every_forward(setting, micro_batch):
    model, _, pairs, *_ = setting
    seen = [Counted(), Counted()]
    _, gradient = gradients(setting, micro_batch, observer=Observers(*seen))
    count = len(pairs)
    measured = 0 if micro_batch == SAMPLES else count
    for one in seen:
        assert one.rows == {"policy": count + measured, "old": count, "reference": 2 * count}
        assert one.pairs == count
    assert sum(seen[0].rows.values()) == sum(model.samples_run.values())
    assert torch.equal(gradient, gradients(setting, micro_batch)[1])


@pytest.mark.parametrize("micro_batch", [1, 4, SAMPLES])
def test_weights_are_switched_once_a_group(setting, monkeypatch, micro_batch):
    weights, used = setting[1], []
    use = weights.use
    monkeypatch.setattr(weights, "use", lambda name: used.append(name) or use(name))
    gradients(setting, micro_batch)
    assert used == ["old", "reference"] * PROMPTS * TIMESTEPS


def test_no_reference_forward_where_the_anchor_has_no_weight(setting):
    model, _, pairs, *_ = setting
    metrics, _ = gradients(setting, SAMPLES, kl_beta=0.0, kl_min=0.0)
    assert model.samples_run == {True: len(pairs), False: len(pairs)}
    assert metrics["kl"] == metrics["kl_loss"] == 0


def test_anchor_fraction_saves_forwards_and_keeps_the_expected_gradient(setting):
    model, _, pairs, *_ = setting
    _, full = gradients(setting, 7)
    halves = []
    for mask in (torch.arange(len(pairs)) % 2, (torch.arange(len(pairs)) + 1) % 2):
        half = Pairs(**vars(pairs) | {"anchor": mask.float() * 2})
        halves.append(gradients(setting, 7, half)[1])
        assert model.samples_run[False] == 2 * len(pairs)  # old, and half of two references
    torch.testing.assert_close((halves[0] + halves[1]) / 2, full, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("micro_batch", [4, SAMPLES])
def test_equal_policy_and_old_have_no_implicit_reward(setting, micro_batch):
    """Nor is old run to find that, and the gradient is that of the whole loss."""
    model, weights, pairs, *_ = setting
    weights.blend("old", 0.0)
    _, expected = autograd_oracle(setting)
    metrics, gradient = gradients(setting, micro_batch)
    assert metrics["implicit_reward_abs"] == 0 and metrics["old_deviation"] == 0
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    measured = 0 if micro_batch == SAMPLES else len(pairs)
    assert model.samples_run == {True: len(pairs), False: 2 * len(pairs) + measured}


@pytest.mark.parametrize("micro_batch", [1, SAMPLES, 100])
def test_spread_of_both_rewards_within_groups_is_reported(setting, micro_batch):
    pairs = setting[2]
    metrics, _ = gradients(setting, micro_batch)
    assert metrics["implicit_variance"] > 0
    a = (pairs.advantage.double().clamp(-5, 5) / 10 + 0.5).view(-1, SAMPLES)
    expected = (a - a.mean(1, keepdim=True)).square().mean()
    assert metrics["external_variance"] == pytest.approx(float(expected))
    torch.testing.assert_close(
        deviation(torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([7, 7, 2, 9])),
        torch.tensor([-1.0, 1.0, 0.0, 0.0]),
    )


def test_noise_depends_on_its_own_seed_alone():
    seeds = seed_table(1, 2, count=5)
    assert torch.equal(seeded_noise(seeds, SHAPE)[3:], seeded_noise(seeds[3:], SHAPE))
    assert not torch.equal(seed_table(1, 2, count=5), seed_table(1, 3, count=5))


def test_memory_is_released_when_the_failed_forward_is_gone(setting, monkeypatch):
    """A cache that is emptied while an error's traceback holds the forward's tensors keeps their memory."""
    model, velocity, held, alive = setting[0], setting[0].velocity, [], []

    def small_memory(x, *arguments):
        if len(x) <= 4:
            return velocity(x, *arguments)
        activations = torch.empty(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError(f"CUDA out of memory with {activations.numel()} held")

    monkeypatch.setattr(model, "velocity", small_memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[-1]() is not None))
    gradients(setting, 16)
    assert alive and not any(alive)


@pytest.mark.parametrize(
    "failures, words", [(1, None), (2, "out of memory while pictures are decoded: CUDA")]
)
def test_decoding_is_tried_twice(failures, words):
    class Model:
        left = failures

        def decode(self, latents):
            self.left -= 1
            if self.left >= 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
            return latents

    if words is None:
        assert torch.equal(decoded(Model(), torch.ones(2)), torch.ones(2))
    else:
        with pytest.raises(UserError, match=words):
            decoded(Model(), torch.ones(2))
