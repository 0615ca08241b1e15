"""Every example runs, does what it says, and agrees with a re-derivation of what it replaces."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

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


class Trainer:
    """The names that Flow-Factory's trainer has where the patch looks."""

    adaptive_logp = True
    adapter = SimpleNamespace(trajectory_component_order=("latents",))

    def _implicit_reward(self, velocity, old_velocity, noised):
        return "original"


def components(**tensors):
    return SimpleNamespace(components=tensors)


@pytest.mark.parametrize("adaptive", [True, False])
def test_flow_factory_reward(adaptive):
    trainer = load("patch_public_trainers").patch_flow_factory(type("Patched", (Trainer,), {}))()
    trainer.adaptive_logp = adaptive
    x = make()
    target, results = x["noise"] - x["x0"], []
    mean = lambda v: v.mean(dim=(1, 2, 3))  # noqa: E731
    for patched in (True, False):
        policy = x["policy"].clone().requires_grad_()
        if patched:
            noised = SimpleNamespace(target_velocity=components(latents=target))
            reward = trainer._implicit_reward(
                components(latents=policy), components(latents=x["old"]), noised
            )
        else:
            scale, old_scale = (mean((v.detach() - target).abs()).clip(min=1e-5) for v in (policy, x["old"]))
            if not adaptive:
                scale = old_scale = 1.0
            reward = mean((x["old"] - target) ** 2) / old_scale - mean((policy - target) ** 2) / scale
        centered = reward - reward.mean().detach()
        ((centered - x["advantage"] / 10) ** 2).mean().backward()
        results.append((reward.detach(), policy.grad))
    for patched, derived in zip(*results):
        assert relative_error(patched, derived) < 1e-11


def test_flow_factory_latents_of_several_components_take_the_original_way():
    trainer = load("patch_public_trainers").patch_flow_factory(type("Patched", (Trainer,), {}))()
    trainer.adapter = SimpleNamespace(trajectory_component_order=("video", "audio"))
    assert trainer._implicit_reward(None, None, None) == "original"


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_diffusion_nft(beta):
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
    total.backward()

    ours = x["policy"].clone().requires_grad_()
    tensors = (x[name] for name in ("old", "ref_cond", "x0", "noise"))
    settings = {"beta": beta, "adv_clip_max": 5.0, "kl_beta": 0.2}
    loss, terms = load("patch_public_trainers").diffusion_nft_loss(
        ours, *tensors, t, x["advantage"], **settings
    )
    loss.backward()
    assert relative_error(loss, total) < 1e-11
    assert relative_error(terms["policy_loss"], wanted) < 1e-11
    assert relative_error(terms["kl_div_loss"], kl) < 1e-11
    assert relative_error(ours.grad, policy.grad) < 1e-11
