"""The rollout against diffusers' own scheduler, and what must not change it."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from crd_fast.models.builtin import SHIFT, BuiltinModel
from crd_fast.out_of_memory import as_out_of_memory
from crd_fast.rewards.advantage import advantages, combine
from crd_fast.seeds import seed_table, seeded_noise
from crd_fast.train.forwards import autocast
from crd_fast.train.micro_batch import MicroBatch, first_sentence
from crd_fast.train.rollout import Sampling, generate
from tests.training.conftest import NO_MEMORY


@pytest.fixture(scope="module")
def model():
    return BuiltinModel.load()


PROMPTS = ("a photo of a red circle", "a photo of two rings")


def rollout(model, micro_batch, guidance_scale=1.0, prompts=PROMPTS):
    return generate(
        model,
        model.encode_prompts(list(prompts)),
        torch.tensor([0, 0, 1]),
        seed_table(1, count=3),
        Sampling(32, 4, guidance_scale, "fp32", model.encode_prompts([""]), MicroBatch(micro_batch)),
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@torch.no_grad()
def test_rollout_is_diffusers_euler(model, guidance_scale):
    """The loop of diffusers' pipelines: set_timesteps, guidance, scheduler.step."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    embeddings = model.encode_prompts(["a photo of a red circle"] * 2 + ["a photo of two rings"])
    empty = model.encode_prompts([""] * 3)
    x = seeded_noise(seed_table(1, count=3), (3, 32, 32))

    def predict(x, timestep, embeddings):
        return model.transformer(
            hidden_states=x,
            timestep=timestep.expand(3),
            encoder_hidden_states=embeddings["states"],
            pooled_projections=embeddings["pooled"],
        ).sample

    for timestep in scheduler.timesteps:
        velocity = predict(x, timestep, embeddings)
        if guidance_scale > 1:
            unconditional = predict(x, timestep, empty)
            velocity = unconditional + guidance_scale * (velocity - unconditional)
        x = scheduler.step(velocity, timestep, x).prev_sample
    # guidance multiplies the rounding of two branches in one batch
    torch.testing.assert_close(rollout(model, 3, guidance_scale), x, rtol=1e-3, atol=1e-3)


def test_micro_batch_does_not_change_the_samples(model):
    torch.testing.assert_close(rollout(model, 1), rollout(model, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_out_of_memory_halves_the_micro_batch(model, monkeypatch, error):
    wanted = rollout(model, 1)
    velocity, sizes = model.velocity, []

    def small_memory(x, *arguments):
        sizes.append(len(x))
        if len(x) > 1:
            raise error
        return velocity(x, *arguments)

    monkeypatch.setattr(model, "velocity", small_memory)
    assert torch.equal(rollout(model, 4), wanted)
    assert sizes[:3] == [3, 2, 1] and set(sizes[3:]) == {1}


def test_what_the_host_has_no_memory_for_is_said():
    with pytest.raises(torch.OutOfMemoryError) as raised, as_out_of_memory():
        torch.empty(2**60, dtype=torch.uint8)
    wanted = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1152921504606846976 bytes"
    assert first_sentence(raised.value) == wanted


def test_prompts_matter(model):
    first = rollout(model, 3)
    other = rollout(model, 3, prompts=("a photo of a blue square", "a photo of two rings"))
    assert not torch.allclose(first[0], other[0], atol=0.1)
    torch.testing.assert_close(first[2], other[2], rtol=1e-4, atol=1e-4)


def test_autocast_sees_the_weights_of_this_step():
    """And holds no copies that were cast: they would be those of the old weights, and fill memory."""
    layer = torch.nn.Linear(8, 8)
    x = torch.ones(1, 8)
    with autocast("cpu", "bf16"):
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        assert (layer(x) - before).abs().min() > 4


def test_advantages():
    reward_PK = torch.tensor([[0.0, 1.0], [2.0, 6.0]]).double().numpy()
    scale = reward_PK.std()
    assert advantages(reward_PK, "global").tolist() == [[-0.5 / scale, 0.5 / scale], [-2 / scale, 2 / scale]]
    assert advantages(reward_PK, "group").tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    assert advantages(reward_PK * 0 + 3, "global").tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_combining_rewards():
    rewards = {"a": torch.tensor([[0.0, 1.0]]).numpy(), "b": torch.tensor([[100.0, 0.0]]).numpy()}
    weights = {"a": 2.0, "b": 1.0}
    assert combine(rewards, weights, "sum").tolist() == [[100.0, 2.0]]
    assert combine(rewards, weights, "gdpo").tolist() == [[-1.0, 1.0]]  # 2 (-1, 1) + (1, -1)
