"""The policy's copy on the host: one for each step, and never older than what was last written."""

import bitsandbytes
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crd_fast.config import build_recipe
from crd_fast.models import load_model, streaming
from crd_fast.plan.planner import Planner
from crd_fast.train.trainer import Trainer
from crd_fast.weights.full import HostWeights
from crd_fast.weights.make import make_weights
from tests.pretend_gpu import pretend_gpu
from tests.training.test_weights import network

STEPS = 2
RECIPE = {
    "model": {"method": "full", "snapshots": "host"},
    "rewards": {"colorfulness": 1.0},
    "train": {"micro_batch": 2, "steps_per_iteration": STEPS, "timesteps": 1, "optimizer": "adamw"},
    "rollout": {"prompts_per_iteration": 2, "samples_per_prompt": 2, "steps": 2},
    "snapshots": {"old": "0/0.5/0/0.5", "sampler": "0/0.5/0/0.5"},
    "evaluate": {"every": 0},
}


class Copies(TorchDispatchMode):
    """Counts what is copied from one of some tensors to another that is none of them."""

    def __init__(self, tensors):
        super().__init__()
        self.pointers, self.count, self.all = {tensor.data_ptr() for tensor in tensors}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source = (tensor.data_ptr() in self.pointers for tensor in args[:2])
            self.count += source and not target
            self.all += source or target
        return func(*args, **(kwargs or {}))


def test_the_policy_is_copied_once_a_step(tmp_path, monkeypatch):
    trainer = Trainer(build_recipe(RECIPE), tmp_path)
    announced, stepped = [], trainer.weights.stepped
    monkeypatch.setattr(trainer.weights, "stepped", lambda: (announced.append(1), stepped()))
    trained = trainer.weights.trained()
    trainer.iterate()
    with Copies(trained) as copies:
        trainer.iterate()
    assert copies.count == STEPS * len(trained)
    assert copies.all > 3 * copies.count  # and switched to and fro between them
    assert len(announced) == 2 * STEPS


def test_pinned_memory_is_one_arena_and_planned(monkeypatch):
    """torch rounds each pinned request up to a power of two: hundreds of tensors must not ask one by one."""
    monkeypatch.setattr(streaming, "SLAB", 1 << 20)
    requests, empty = [], torch.empty

    def spy(*size, pin_memory=False, **kwargs):
        if pin_memory:
            requests.append(size[0])
        return empty(*size, **kwargs)

    settings = build_recipe(RECIPE)
    with pretend_gpu():
        model = load_model(settings)
        monkeypatch.setattr(torch, "empty", spy)
        tensors = make_weights(model, settings).host_tensors()
        monkeypatch.undo()
    held = sum(tensor.nbytes for tensor in tensors)
    assert len(tensors) > 4 * len(requests) and all(size.bit_count() == 1 for size in requests)
    assert held <= sum(requests) < 1.1 * held
    monkeypatch.setattr(streaming, "SLAB", 1 << 20)
    assert Planner(settings).host_bytes == sum(requests)


@torch.no_grad()
def in_place(weights):
    weights.trained()[3].add_(1.0)


def past_torch(weights):
    weights.trained()[3].data.view(-1)[-1].neg_()


def exchanged(weights):
    parameter = weights.trained()[3]
    parameter.data = parameter.data + 1.0


def restored(weights):
    weights.load_state({name: value + 1.0 for name, value in weights.state().items()})


def rearranged_and_announced(weights):  # the sums of the bits are the same
    parameter = weights.trained()[3]
    parameter.data.copy_(parameter.flip(0))
    weights.stepped()


def trained_in_8_bits(weights):
    optimizer = bitsandbytes.optim.AdamW8bit(weights.trained(), lr=1e-2, min_8bit_size=64)
    for parameter in weights.trained():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    "write", [in_place, past_torch, exchanged, restored, rearranged_and_announced, trained_in_8_bits]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_survives_a_switch(write, dtype):
    weights = HostWeights(network().to(dtype))
    with weights.use("old"):
        pass
    before = [parameter.detach().clone() for parameter in weights.trained()]
    write(weights)
    written = [parameter.detach().clone() for parameter in weights.trained()]
    assert not all(map(torch.equal, written, before))
    with weights.use("old"):
        assert all(map(torch.equal, weights.trained(), before)) or write is restored
    assert all(map(torch.equal, weights.trained(), written))
    write(weights)
    written = [parameter.detach().float() for parameter in weights.trained()]
    weights.blend("old", 0.0)
    assert all(torch.equal(weights.state()[f"old/{n}"], w) for (n, _), w in zip(named(weights), written))


def named(weights):
    return weights.network.named_parameters()
