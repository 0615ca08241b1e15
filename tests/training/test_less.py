"""What computes less: drawn without bias, or the same numbers by fewer forwards."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.models.builtin import PATCH, WORLD, BuiltinModel
from crd_fast.models.streaming import Pinned
from crd_fast.ranks import Ranks
from crd_fast.seeds import seed_table, seeded_noise
from crd_fast.train.draws import drawn_in_groups, drawn_weights, inclusion, systematic
from crd_fast.train.kept import OnHost
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.objectives import make_objective
from crd_fast.train.pairs import Pairs, draw_pairs
from crd_fast.train.rollout import Sampling, generate
from crd_fast.train.signal import Signal
from crd_fast.train.trainer import Trainer
from tests.training.conftest import METHODS, SAMPLES, gradients

OFFSETS = (np.arange(500) + 0.5) / 500  # the mean over them is that over uniform ones


def test_probabilities_are_proportional_and_at_most_one():
    size = np.array([0.0, 1.0, 2.0, 3.0, 30.0])
    np.testing.assert_allclose(inclusion(size, 1), size / 36)
    np.testing.assert_allclose(inclusion(size, 2), [0, 1 / 6, 2 / 6, 3 / 6, 1])
    np.testing.assert_allclose(inclusion(size, 3), [0, 1 / 3, 2 / 3, 1, 1])
    np.testing.assert_allclose(inclusion(size, 5), [0, 1, 1, 1, 1])
    np.testing.assert_allclose(inclusion(np.zeros(3), 2), 0)


def test_each_is_drawn_as_often_as_its_probability_says():
    probability = inclusion(np.random.default_rng(0).random((4, 7)), 9)
    drawn = np.stack([systematic(probability, np.full(4, offset)) for offset in OFFSETS])
    np.testing.assert_allclose(drawn.mean(0), probability, atol=2 / len(OFFSETS))
    count = drawn.sum(2)
    assert (np.abs(count - probability.sum(1)) < 1).all()  # never further from it than by rounding


def test_equal_probabilities_give_one_of_each_stratum():
    for offset in OFFSETS:
        (drawn,) = systematic(np.full((1, 10), 0.3), np.array([offset])).nonzero()[1:]
        assert [3 * i // 10 for i in drawn] == [0, 1, 2] or (np.diff(drawn) >= 3).all()
    assert systematic(np.ones((1, 10)), np.array([0.7])).all()


def test_weighted_sums_have_the_expectation_of_the_whole():
    rng = np.random.default_rng(1)
    size, value = rng.random((3, 8)), rng.normal(size=(3, 8))
    sums = [(drawn_weights(size, 6, np.full(3, offset)) * value).sum() for offset in OFFSETS]
    assert np.mean(sums) == pytest.approx(value.sum(), abs=0.05)
    assert np.std(sums) > 0.1


@pytest.mark.parametrize("fraction", [1 / 2, 1 / 3])
@pytest.mark.parametrize("name", [{}, *METHODS.values()], ids=["crd", *METHODS])
def test_backward_for_a_part_has_the_gradient_of_all_on_average(setting, name, fraction, monkeypatch):
    """Over all offsets; those that draw the same pairs are run once."""
    model, _, pairs, *_ = setting
    metrics, full = gradients(setting, 4, **name)
    drawing = []

    def recorded(*arguments):
        drawing.append(arguments)
        return drawn_in_groups(*arguments)

    def of(offset):
        drawn = Pairs(**vars(pairs) | {"offset": torch.full((len(pairs),), offset, dtype=torch.float64)})
        return gradients(setting, 4, drawn, updater={"backward_fraction": fraction}, **name)

    monkeypatch.setattr("crd_fast.train.update.drawn_in_groups", recorded)
    of(0.5)
    groups, found, mean = drawing.copy(), {}, torch.zeros_like(full)
    for offset in OFFSETS:
        drawn = [
            drawn_in_groups(size, group, np.full(len(size), offset), fraction) > 0
            for size, group, *_ in groups
        ]
        drawn = np.concatenate(drawn).tobytes()
        if drawn not in found:
            of_drawn, found[drawn] = of(offset)
            assert model.samples_run[True] == fraction * len(pairs)
            assert of_drawn == pytest.approx(metrics)  # what is measured is of all pairs
        mean += found[drawn] / len(OFFSETS)
    assert 4 < len(found) < 50
    assert (mean - full).norm() < 0.005 * full.norm()
    assert min((gradient - full).norm() for gradient in found.values()) > 0.02 * full.norm()


@pytest.mark.parametrize("micro_batch", [1, 4, SAMPLES, 100])
def test_backward_for_a_part_does_not_depend_on_the_micro_batch(setting, micro_batch):
    pairs = setting[2]
    drawn = Pairs(**vars(pairs) | {"offset": torch.full((len(pairs),), 0.3, dtype=torch.float64)})
    expected = gradients(setting, 5, drawn, updater={"backward_fraction": 0.5})
    metrics, gradient = gradients(setting, micro_batch, drawn, updater={"backward_fraction": 0.5})
    assert metrics == pytest.approx(expected[0])
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-10)


def test_backward_for_a_part_takes_pairs_without_an_anchor(setting):
    """Some micro-batches have a reference then and others none."""
    pairs = setting[2]
    anchor = torch.zeros(len(pairs))
    anchor[3:5] = 4.0
    offset = torch.full((len(pairs),), 0.3, dtype=torch.float64)
    drawn = Pairs(**vars(pairs) | {"anchor": anchor, "offset": offset})
    expected = gradients(setting, SAMPLES, drawn, updater={"backward_fraction": 0.5})[1]
    torch.testing.assert_close(
        gradients(setting, 2, drawn, updater={"backward_fraction": 0.5})[1], expected, rtol=1e-6, atol=1e-10
    )


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("centering", ["prompt", "batch"])
@pytest.mark.parametrize("where", ["device", "host"])
def test_kept_graphs_save_a_forward_and_change_no_bit(setting, micro_batch, centering, where):
    model, _, pairs, *_ = setting
    metrics, gradient = gradients(setting, micro_batch, centering=centering)
    run = dict(model.samples_run)
    kept = gradients(setting, micro_batch, centering=centering, updater={"kept_graphs": where})
    assert kept[0] == metrics and torch.equal(kept[1], gradient)
    assert model.samples_run == {True: run[True], False: run[False] - len(pairs)}


def test_kept_graphs_of_a_group_share_pieces_of_pinned_memory(setting, monkeypatch):
    """A piece has 256 MB: one for each micro-batch would be several times what is kept."""
    seen = []

    class Noted(OnHost):
        def __init__(self, network, pinned):
            seen.append(pinned)
            super().__init__(network, pinned)

    monkeypatch.setattr("crd_fast.train.update.OnHost", Noted)
    gradients(setting, 1, updater={"kept_graphs": "host"})
    pairs = len(setting[2])
    assert len(seen) == pairs and len(set(map(id, seen))) == pairs // SAMPLES


def test_inputs_of_checkpointed_blocks_go_to_the_host_and_nothing_else():
    """Their gradients are the same to the bit, and what is inside a block is recomputed there."""
    model = BuiltinModel.load(WORLD)
    network = model.transformer.requires_grad_(True)
    network.enable_gradient_checkpointing()
    count = 48  # so that one input of a block is more than is worth sending
    embeddings = model.encode_prompts(["a photo of a red circle"] * count)
    x, sigma = torch.randn(count, *model.latent_shape(32)), torch.full((count,), 0.5)

    def gradient(context):
        network.zero_grad()
        with context:
            velocity = model.velocity(x, sigma, embeddings)
        velocity.square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    expected, on_host = gradient(nullcontext()), OnHost(network, Pinned())
    found = gradient(on_host)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    tokens = count * (model.kind.height // PATCH) * (model.kind.width // PATCH)
    states = count * model.kind.max_tokens
    of_blocks = network.config.num_layers * (tokens + states) * network.inner_dim * 4
    assert of_blocks <= on_host.bytes < 2 * of_blocks


def test_groups_with_equal_rewards_have_an_anchor_alone(setting):
    """The first group of two: no policy's term, its anchored pairs as before, its others not run at all."""
    model, _, pairs, *_ = setting
    policy, anchor, advantage = torch.ones(len(pairs)), torch.ones(len(pairs)), pairs.advantage.clone()
    policy[:SAMPLES], anchor[1:SAMPLES], advantage[:SAMPLES] = 0.0, 0.0, 0.0
    skipped = Pairs(**vars(pairs) | {"policy": policy, "anchor": anchor, "advantage": advantage})
    metrics, gradient = gradients(setting, 4, skipped)
    assert model.samples_run[True] == len(pairs) - SAMPLES + 1
    rest = Pairs(**vars(pairs[SAMPLES:]))
    metrics_of_rest, of_rest = gradients(setting, 4, rest)
    for name in ("policy_loss", "implicit_reward_abs", "implicit_variance", "old_deviation"):
        assert metrics[name] * len(pairs) == pytest.approx(metrics_of_rest[name] * len(rest)), name
    first = skipped[:1]
    _, of_first = gradients(setting, 4, first)
    expected = (of_rest * len(rest) + of_first) / len(pairs)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-10)


def test_a_step_without_any_term_has_a_gradient_of_zero(setting):
    pairs = setting[2]
    none = Pairs(**vars(pairs) | {"policy": torch.zeros(len(pairs)), "anchor": torch.zeros(len(pairs))})
    metrics, gradient = gradients(setting, 4, none)
    assert (gradient == 0).all() and all(np.isfinite(list(metrics.values())))


def test_a_part_of_pairs_without_a_gradient_has_one_of_zeros(setting):
    pairs = setting[2]
    none = Pairs(**vars(pairs) | {"policy": torch.zeros(len(pairs)), "anchor": torch.ones(len(pairs))})
    _, gradient = gradients(setting, 4, none, updater={"backward_fraction": 0.5}, kl_beta=0.0, kl_min=0.0)
    assert (gradient == 0).all()


# the recipe that ships leaves out what this file leaves out
PUBLISHED = ("rollout.solver=euler", "rollout.steps=10", "loss.anchor_fraction=1.0", "train.timesteps=3")


def drawn_pairs(*overrides, advantage=None, signal=None, iteration=3):
    recipe = load_recipe("builtin", [*PUBLISHED, "rollout.prompts_per_iteration=6", *overrides])
    if advantage is None:
        advantage = np.random.default_rng(0).normal(size=(6, 8))
    strength = make_objective(recipe.loss, recipe.advantage.clip).anchor_strength(advantage)
    prompts = np.arange(6)
    sigmas = torch.linspace(1, 0, recipe.rollout.steps + 1)
    return draw_pairs(
        *(recipe, iteration, sigmas, prompts),
        advantage_PK=advantage,
        anchor_strength_PK=strength,
        signal=signal,
    )


def test_anchored_pairs_are_drawn_by_the_strength_of_their_anchor():
    whole = drawn_pairs("train.timesteps=all")
    part = drawn_pairs("train.timesteps=all", "loss.anchor_fraction=0.25")
    recipe = load_recipe("builtin")
    strength = make_objective(recipe.loss, recipe.advantage.clip).anchor_strength(whole.advantage.numpy())
    assert (whole.anchor == 1).all()
    drawn = part.anchor.numpy() > 0
    assert drawn.sum() == pytest.approx(0.25 * len(part), abs=6)
    weighted = strength[drawn] * part.anchor.numpy()[drawn]
    assert np.ptp(weighted) < 1e-5 * weighted.mean()  # strength / probability
    assert weighted.sum() == pytest.approx(strength.sum(), rel=0.05)


def test_a_ranks_pairs_are_those_of_its_prompts():
    whole, own = drawn_pairs("train.timesteps=2", "loss.anchor_fraction=0.5"), np.array([4, 1])
    part, kept = whole.of_prompts(own, 8), (whole.prompt == 4) | (whole.prompt == 1)
    assert part.prompt.tolist() == [[4, 1].index(prompt) for prompt in whole.prompt[kept].tolist()]
    assert torch.equal(part.sample % 8, whole.sample[kept] % 8) and torch.equal(part.sample // 8, part.prompt)
    for name in ("sigma", "seed", "group", "advantage", "anchor", "policy", "offset", "step"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[kept])


def test_high_noise_trains_the_noisier_half():
    assert load_recipe("builtin", [*PUBLISHED, "train.timestep_sampling=high-noise"]).training_steps() == [
        0,
        1,
        2,
        3,
        4,
    ]
    pairs = drawn_pairs("train.timestep_sampling=high-noise")
    assert pairs.sigma.min() > 0.5 and len(pairs) == 6 * 3 * 8


def test_timesteps_are_drawn_by_their_signal_without_bias():
    signal = np.array([1.0, 0.9, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25])
    value, sums, times = np.random.default_rng(2).normal(size=10), [], np.zeros(10)
    for iteration in range(400):
        pairs = drawn_pairs("train.timesteps=2", signal=signal, iteration=iteration)
        assert len(pairs) == 6 * 2 * 8
        sums.append((pairs.policy.numpy() * value[pairs.step.numpy()]).mean())
        assert torch.equal(pairs.policy, pairs.anchor)  # every pair is anchored here
        times += np.bincount(pairs.step.numpy(), minlength=10)
    np.testing.assert_allclose(times / times.max(), signal, atol=0.06)
    assert np.mean(sums) == pytest.approx(value.mean(), abs=3 * np.std(sums) / 20)
    whole = drawn_pairs("train.timesteps=all", signal=signal)
    assert (whole.policy == 1).all()


def test_signal_is_a_running_size_that_is_kept():
    signal, ranks = Signal(4), Ranks()
    assert (signal.sizes() == 1).all()
    signal.see(torch.tensor([0, 0, 1]), torch.tensor([3.0, 4.0, 0.0]))
    signal.end_iteration(ranks)
    assert signal.state == [12.5, 0.0, None, None]
    np.testing.assert_allclose(signal.sizes(), [1, 0.25, 1, 1])
    signal.see(torch.tensor([0, 2]), torch.tensor([0.0, np.sqrt(2.0)]))
    signal.end_iteration(ranks)
    np.testing.assert_allclose(signal.state[:3], [0.9 * 12.5, 0.0, 2.0])
    assert Signal(4, signal.state).state == signal.state


@pytest.mark.slow
def test_a_resumed_run_draws_by_the_same_signal(tmp_path):
    overrides = [
        "train.timestep_sampling=by-signal",
        "rollout.prompts_per_iteration=2",
        "rollout.steps=4",
        "train.timesteps=1",
        "evaluate.every=0",
        "checkpoint.every=1",
        "train.iterations=3",
    ]
    whole = Trainer(load_recipe("builtin", overrides), tmp_path / "whole")
    whole.run()
    assert len(set(whole.signal.sizes())) > 1
    first = Trainer(load_recipe("builtin", [*overrides, "train.iterations=2"]), tmp_path / "two")
    first.run()
    second = Trainer(load_recipe("builtin", overrides), tmp_path / "two", resume=True)
    second.run()
    assert second.signal.state == whole.signal.state
    for mine, other in zip(second.weights.trained(), whole.weights.trained()):
        assert torch.equal(mine, other)


def test_equal_groups_are_found_and_skipped():
    advantage = np.random.default_rng(0).normal(size=(6, 8))
    advantage[2] = 0.0
    pairs = drawn_pairs("train.skip_equal_groups=true", advantage=advantage)
    assert torch.equal(pairs.policy == 0, pairs.prompt == 2)
    assert (drawn_pairs(advantage=advantage).policy == 1).all()


@pytest.mark.parametrize("loss", [{}, {"type": "bce"}, {"method": "dpo"}, *METHODS.values()])
def test_loss_is_of_the_pairs_with_a_term_whether_the_others_are_anchored_or_not(setting, loss):
    term = (setting[2].group > 0).float()
    losses = []
    for anchor in (torch.ones_like(term), term):
        pairs = replace(setting[2], policy=term, anchor=anchor)
        losses.append(gradients(setting, SAMPLES, pairs, **loss)[0]["policy_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    "override, message",
    [
        (["train.backward_fraction=0.1"], "train.backward_fraction: expected at least one of"),
        (
            ["train.backward_fraction=0.5", "train.kept_graphs=host"],
            "train.kept_graphs: expected none with train.backward_fraction 0.5, got host",
        ),
        (
            ["train.timestep_sampling=by-signal", "train.timesteps=all"],
            "train.timestep_sampling: expected uniform or high-noise where",
        ),
        (
            ["train.timestep_sampling=by-signal", "rollout.steps=2", "train.timesteps=2"],
            r"timesteps \(2\) leaves",
        ),
        (["train.skip_equal_groups=true", "model.sharding=fsdp"], "expected 1.0 and false"),
        (["train.skip_equal_groups=true", "loss.centering=batch"], "1.0 and false with loss.centering batch"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("builtin", override)


class Bent:
    """A field whose solution is known: dx / dsigma = x - 2 sigma, so x = c e^sigma + 2 sigma + 2."""

    device = torch.device("cpu")

    def latent_shape(self, resolution):
        return (1, 2, 2)

    def sigmas(self, steps, resolution):
        return torch.linspace(1, 0, steps + 1) ** 1.3  # uneven steps

    def velocity(self, x, sigma, embeddings):
        return x - 2 * sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("ab2", 2)])
def test_order_of_the_solvers(solver, order):
    seeds = seed_table(1, count=2)
    x1 = seeded_noise(seeds, (1, 2, 2))
    expected = (x1 - 4) / np.e + 2

    def error(steps):
        sampling = Sampling(8, steps, 1.0, "fp32", {}, MicroBatch(2), solver)
        return float((generate(Bent(), {}, torch.zeros(2).long(), seeds, sampling) - expected).abs().max())

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.15)
