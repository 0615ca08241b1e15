"""Activation checkpointing of some blocks: the same gradients, and those blocks alone run again."""

from collections import Counter

import pytest
import torch

from crd_fast.models import load_model
from crd_fast.models.checkpointing import recomputed_blocks
from crd_fast.models.streaming import repeated_blocks
from crd_fast.weights.make import make_weights
from tests.models.conftest import PROMPTS
from tools.make_tiny_pipeline import FAMILIES

BF16_NF4 = ("model.quantization=nf4", "train.precision=bf16")


def forwards_and_gradient(recipe):
    """How often each block ran in one forward and backward pass, and the gradient."""
    model = load_model(recipe)
    weights = make_weights(model, recipe)
    torch.manual_seed(5)
    for parameter in weights.trained():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    blocks, ran = repeated_blocks(model.transformer), Counter()
    for index, block in enumerate(blocks):
        forward = block.forward
        block.forward = lambda *a, i=index, f=forward, **k: ran.update([i]) or f(*a, **k)
    x = torch.randn(2, *model.latent_shape(64), generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        out = model.velocity(x, torch.tensor([0.9, 0.3]), model.encode_prompts(PROMPTS))
    out.float().square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in weights.trained() if p.grad is not None])
    return [ran[index] for index in range(len(blocks))], gradient


@pytest.mark.parametrize(
    "family, settings",
    [*((family, ()) for family in FAMILIES), ("sd3", BF16_NF4)],
    ids=[*FAMILIES, "sd3-nf4"],
)
def test_gradients_are_the_same_to_the_bit(tiny, recipe, family, settings):
    runs = {
        share: forwards_and_gradient(recipe(tiny(family), *settings, f"train.checkpointing={share}"))
        for share in ("false", "0.5", "true")
    }
    none, half, every = (counts for counts, _ in runs.values())
    again = round(len(none) / 2)
    assert set(none) == {1} and set(every) == {2}
    assert half == [2] * again + [1] * (len(half) - again)
    for _, gradient in runs.values():
        assert torch.equal(gradient, runs["false"][1])


@pytest.mark.parametrize(
    "share, count", [(0.0, 0), (False, 0), (0.29, 1), (0.31, 2), (0.8, 4), (1.0, 5), (True, 5)]
)
def test_the_first_blocks_compute_again(share, count):
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5))
    assert recomputed_blocks(network, share) == list(network.blocks[:count])
