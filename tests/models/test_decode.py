"""Pictures are decoded whole, as by the pipeline, and in tiles where there is no memory for that."""

import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crd_fast.models import load_model
from crd_fast.plan.fit import RESERVED, fit
from crd_fast.plan.planner import Planner
from tests.models import conftest
from tests.models.conftest import ALL, by_pipeline, by_rollout, load_pipeline, packed

# sizes above the tiles of those that have small ones
SIZES = dict.fromkeys(ALL, 64) | {"qwen-image": 320, "sana": 544}
TILED = ["qwen-image", "sana"]


class Memory(TorchDispatchMode):
    """No tensor of more bytes than these can be made. made: of the largest that was wanted."""

    def __init__(self, largest=math.inf):
        super().__init__()
        self.largest, self.made = largest, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        size = made.untyped_storage().nbytes() if isinstance(made, torch.Tensor) else 0
        self.made = max(self.made, size)
        if size > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made


def latents_of(model, family, count=2):
    shape = model.latent_shape(SIZES[family])
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", TILED)
def test_large_pictures_are_the_pipelines(tiny, recipe, family, monkeypatch):
    monkeypatch.setattr(conftest, "RESOLUTION", SIZES[family])
    model, pipe = load_model(recipe(tiny(family))), load_pipeline(tiny(family))
    images, latents = by_rollout(model)
    expected_images, expected_latents = by_pipeline(pipe, family)
    torch.testing.assert_close(packed(pipe, latents), expected_latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images, expected_images, rtol=1e-4, atol=1e-4)
    assert images.shape[1:3] == (SIZES[family],) * 2 and images.std() > 0.01
    model.pipe.vae.enable_tiling()
    assert (model.decode(latents) - images).abs().max() > 1e-2  # what tiles would make of it


@pytest.mark.parametrize("family", TILED)
def test_without_memory_for_it_tiles_are_taken_and_said_once(tiny, recipe, family, caplog):
    always = load_model(recipe(tiny(family), "model.vae_tiling=always"))
    latents = latents_of(always, family)
    tiles = always.decode(latents)
    model = load_model(recipe(tiny(family)))
    with Memory() as memory:
        whole = model.decode(latents)
    assert (whole - tiles).abs().max() > 1e-2
    with caplog.at_level(logging.WARNING, logger="crd_fast"):
        torch.testing.assert_close(model.decode(latents), whole, rtol=0, atol=0)
        assert not caplog.records
        with Memory(memory.made - 1):
            torch.testing.assert_close(model.decode(latents), tiles, rtol=0, atol=0)
        torch.testing.assert_close(model.decode(latents), tiles, rtol=0, atol=0)
    (record,) = caplog.records
    assert "no memory to decode pictures whole; from now on they are decoded in tiles" in record.getMessage()
    with Memory(1000), pytest.raises(torch.OutOfMemoryError):
        model.decode(latents)


@pytest.mark.slow
def test_a_plan_takes_tiles_where_only_whole_pictures_do_not_fit(tiny, recipe):
    # not of all blocks, or it would be planned again without, to see what is faster
    room = ("train.checkpointing=0.5", "model.text_length=64")
    settings = recipe(tiny("qwen-image"), "rollout.resolution=384", *room)
    peaks = {name: peak.bytes for name, peak in Planner(settings).plan(1, 1).phases.items()}
    whole = peaks.pop("decode")
    assert max(peaks.values()) < whole
    (found,) = fit(settings, whole + RESERVED - 1)
    assert found.overrides[0] == "model.vae_tiling=always" and not found.missing
    assert 2 * found.plan.phases["decode"].bytes < whole
    (found,) = fit(settings, whole + RESERVED)
    assert not any("tiling" in override for override in found.overrides)
