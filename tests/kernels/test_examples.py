"""Every example runs, does what it says, and agrees with a re-derivation of what it replaces."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from kernel_oracle import make, relative_error

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_training_loop_raises_the_reward():
    rewards = load("own_training_loop").train(iterations=30)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_diffusers_loss_falls():
    pytest.importorskip("diffusers")
    losses = load("diffusers_loss").train(steps=12)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_diffusers_loss_is_the_scripts():
    from crd_kernels import flow_matching_loss

    x = make(dtype=torch.float32)
    weighting = torch.rand(7, 1, 1, 1)
    squares = weighting * (x["policy"] - (x["noise"] - x["x0"])) ** 2
    wanted = squares.reshape(7, -1).mean(1).mean()
    got = flow_matching_loss(x["policy"], x["x0"], x["noise"], weight=weighting.flatten()).loss
    assert relative_error(got, wanted) < 1e-6


def test_packed_tokens_are_samples_of_their_own_length():
    from crd_kernels import flow_matching_loss

    def run(loss_of):
        torch.manual_seed(0)
        lists = [[torch.randn(tokens, 6, dtype=torch.float64) for tokens in (9, 4, 13)] for _ in range(3)]
        policies = [policy.requires_grad_() for policy in lists[0]]
        loss = loss_of(*lists)
        loss.backward()
        return loss, *(policy.grad for policy in policies)

    def one_by_one(*lists):
        losses = [flow_matching_loss(*(tensor[None] for tensor in sample)).loss for sample in zip(*lists)]
        return sum(losses) / len(losses)

    for got, wanted in zip(run(load("packed_tokens").padded_loss), run(one_by_one)):
        assert relative_error(got, wanted) < 1e-12


@dataclass
class LatentState:
    components: dict
    active_masks: dict | None = None  # bool, of the components' rank, sizes of 1 broadcast


@dataclass
class NoisedState:
    state: LatentState
    target_velocity: LatentState
    noise: LatentState


class BaseAdapter:
    """Flow-Factory's reductions: public ones that call protected ones, which an adapter may override."""

    trajectory_component_order = ("latent",)

    def reduce_component_latent_values(self, values, *, state=None):
        return self._reduce_component_latent_values(values, state=state)

    def _reduce_component_latent_values(self, values, *, state=None):
        return {name: mean_of_active({name: values[name]}, state) for name in self.trajectory_component_order}

    def reduce_latent_values(self, values, *, active_numel=None, state=None):
        return self._reduce_latent_values(values, active_numel=active_numel, state=state)

    def _reduce_latent_values(self, values, *, active_numel=None, state=None):
        assert active_numel is None and tuple(values) == self.trajectory_component_order
        return mean_of_active(values, state)


def mean_of_active(values, state):
    """(B,): over the active elements of all components, each of which counts the same."""
    sums, counts = 0, 0
    for name, value in values.items():
        active = torch.ones_like(value, dtype=torch.bool)
        if state is not None and state.active_masks is not None:
            active = state.active_masks[name].expand(value.shape)
        sums = sums + torch.where(active, value, 0).flatten(1).sum(1)
        counts = counts + active.flatten(1).sum(1)
    return sums / counts


class Trainer:
    """The names that Flow-Factory's trainer has where the patch looks, and the reward that it replaces."""

    adaptive_logp = True
    originals = 0

    def __init__(self, adapter):
        self.adapter = adapter

    def _implicit_reward(self, velocity, old_velocity, noised):
        self.originals += 1
        names = self.adapter.trajectory_component_order
        rewards = dict.fromkeys(names, 0.0)
        for state, sign in ((velocity, -1), (old_velocity, 1)):
            gaps = {name: state.components[name] - noised.target_velocity.components[name] for name in names}
            sizes = {name: gaps[name].detach().double().abs() for name in names}
            scales = self.adapter.reduce_component_latent_values(sizes, state=noised.state)
            for name, gap in gaps.items():
                scale = scales[name].clip(min=1e-5) if self.adaptive_logp else torch.ones(len(gap))
                rewards[name] = rewards[name] + sign * gap**2 / scale.view(-1, *[1] * (gap.dim() - 1))
        return self.adapter.reduce_latent_values(rewards, state=noised.state)


@pytest.fixture
def patched_trainer(monkeypatch):
    """Patched as the example says, in a process where Flow-Factory's base class can be imported."""
    for name in ("flow_factory", "flow_factory.models", "flow_factory.models.abc"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flow_factory.models.abc"].BaseAdapter = BaseAdapter
    return load("patch_public_trainers").patch_flow_factory(type("Patched", (Trainer,), {}))


SHAPES = {"latent": (4, 6, 6), "video": (12, 6), "audio": (5, 3)}


def flow_factory_states(names, masked):
    """(policy, old, noised) of these components. Inactive elements have a target of 0, as theirs have."""
    inputs = {name: make(shape=SHAPES[name], seed=seed) for seed, name in enumerate(names)}
    target = {name: x["noise"] - x["x0"] for name, x in inputs.items()}
    masks = None
    if masked:
        masks = {name: rows_active(value) for name, value in target.items()}
        target = {name: value * masks[name] for name, value in target.items()}
    policy, old, noise = (
        LatentState({name: x[key] for name, x in inputs.items()}) for key in ("policy", "old", "noise")
    )
    return policy, old, NoisedState(LatentState(noise.components, masks), LatentState(target), noise)


def rows_active(latents):
    """(B, rows, 1, ...): about half of them, others and another number of them in every sample."""
    random = torch.Generator().manual_seed(latents.dim())
    active = torch.rand(latents.shape[:2], generator=random) > 0.5
    active[:, 0] = True
    assert active.sum(1).unique().numel() > 1
    return active.view(*active.shape, *[1] * (latents.dim() - 2))


def reward_and_gradients(trainer, policy, old, noised):
    leaves = {name: value.clone().requires_grad_() for name, value in policy.components.items()}
    reward = trainer._implicit_reward(LatentState(leaves), old, noised)
    (reward * torch.arange(1, 1 + len(reward))).sum().backward()
    return reward.detach(), *(leaf.grad for leaf in leaves.values())


@pytest.mark.parametrize("names", [("latent",), ("video", "audio")], ids="-".join)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_flow_factory_reward(patched_trainer, names, masked, adaptive):
    states = flow_factory_states(names, masked)
    results, originals = [], []
    for kind in (patched_trainer, Trainer):
        trainer = kind(BaseAdapter())
        trainer.adapter.trajectory_component_order, trainer.adaptive_logp = names, adaptive
        results.append(reward_and_gradients(trainer, *states))
        originals.append(trainer.originals)
    assert originals == [0, 1]
    for patched, original in zip(*results, strict=True):
        assert relative_error(patched, original) < 1e-11


def test_flow_factory_reward_of_an_older_version(patched_trainer, monkeypatch):
    """One whose states have no masks, and whose reductions have no hooks."""
    policy, old, noised = flow_factory_states(("latent",), False)
    wanted = reward_and_gradients(Trainer(BaseAdapter()), policy, old, noised)
    for name in ("_reduce_latent_values", "_reduce_component_latent_values"):
        monkeypatch.delattr(BaseAdapter, name)
    noised.state = SimpleNamespace(components=noised.state.components)
    trainer = patched_trainer(BaseAdapter())
    for patched, original in zip(reward_and_gradients(trainer, policy, old, noised), wanted, strict=True):
        assert relative_error(patched, original) < 1e-11


REDUCTIONS = [name for name in vars(BaseAdapter) if "reduce" in name]


@pytest.mark.parametrize("where", ["class", "parent", "instance"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_flow_factory_adapters_that_reduce_in_their_own_way_keep_the_original(patched_trainer, name, where):
    own = {name: lambda self, *args, **keywords: getattr(BaseAdapter, name)(self, *args, **keywords)}
    kind = BaseAdapter if where == "instance" else type("Adapter", (BaseAdapter,), own)
    adapter = type("Child", (kind,), {})() if where == "parent" else kind()
    if where == "instance":
        setattr(adapter, name, MethodType(own[name], adapter))
    trainer = patched_trainer(adapter)
    states = flow_factory_states(("latent",), True)
    got, wanted = (reward_and_gradients(each, *states) for each in (trainer, Trainer(adapter)))
    assert trainer.originals == 1
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize(("beta", "steps"), [(0.1, 1), (1.0, 1), (1.0, 12)])
def test_diffusion_nft(beta, steps):
    """The published two-branch loss, derived in the space of clean latents where the script computes it."""
    x, t = make(), torch.tensor([0.05, 0.2, 0.4, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    column, mean = t.view(-1, 1, 1, 1), lambda v: v.mean(dim=(1, 2, 3))
    policy = x["policy"].clone().requires_grad_()
    x_t = (1 - column) * x["x0"] + column * x["noise"]

    def branch(velocity):
        residual = x_t - column * velocity - x["x0"]
        return mean(residual**2 / mean(residual.detach().abs()).clip(min=1e-5).view(-1, 1, 1, 1))

    positive = branch(beta * policy + (1 - beta) * x["old"])
    negative = branch((1 + beta) * x["old"] - beta * policy)
    r = (x["advantage"].clamp(-5, 5) / 5 / 2 + 0.5).clamp(0, 1)
    wanted = (5 * (r * positive + (1 - r) * negative) / beta).mean()
    kl = mean((policy - x["ref_cond"]) ** 2).mean()
    total = wanted + 0.2 * kl
    (total / steps).backward()

    ours = x["policy"].clone().requires_grad_()
    tensors = (x[name] for name in ("old", "ref_cond", "x0", "noise"))
    settings = {"beta": beta, "adv_clip_max": 5.0, "kl_beta": 0.2, "effective_grad_accum_steps": steps}
    loss, terms = load("patch_public_trainers").diffusion_nft_loss(
        ours, *tensors, t, x["advantage"], **settings
    )
    loss.backward()
    assert relative_error(loss, total / steps) < 1e-11
    assert relative_error(ours.grad, policy.grad) < 1e-11
    logged = {
        "policy_loss": wanted,
        "unweighted_policy_loss": wanted / 5,
        "kl_div_loss": kl,
        "kl_div": kl,
        "old_deviate": ((policy - x["old"]) ** 2).mean(),
        "total_loss": total,
    }
    assert terms.keys() == logged.keys()
    for name, value in logged.items():
        assert relative_error(terms[name], value) < 1e-11, name
