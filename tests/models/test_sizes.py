"""Pictures that are not square, and several sizes: as pipelines draw them, trained, evaluated, planned."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.plan.cost import cost
from crd_fast.plan.planner import Planner
from crd_fast.sizes import size_of_text
from crd_fast.train.inference import sample_grid
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.rollout import Sampling, generate
from crd_fast.train.trainer import Trainer
from tests.models.conftest import ALL, GUIDANCE, GUIDED, PROMPTS, SEEDS, STEPS, load_pipeline, packed, short

SIZE = (96, 64)  # height and width
shapes: list[tuple[int, int]] = []


def shape(images, prompts, metadata):
    """A reward that remembers what it saw."""
    shapes.append(images.shape[1:3])
    return [float(image.mean()) / 255 for image in images]


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_rollout_is_the_pipelines(tiny, recipe, family):
    model = load_model(recipe(tiny(family), f"rollout.resolution={list(SIZE)}"))
    pipe, latents = load_pipeline(tiny(family)), {}
    settings = GUIDED[family](GUIDANCE)
    if "negative_prompt" in settings:
        settings["negative_prompt"] = [""] * 2
    if family == "sana":
        settings |= {"use_resolution_binning": False, "sigmas": [1 - i / STEPS for i in range(STEPS)]}
    images = pipe(
        prompt=list(PROMPTS),  # which some write into
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[:2]],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, time, values: latents.update(values) or values,
        **settings,
    ).images.permute(0, 2, 3, 1)
    sampling = Sampling(SIZE, STEPS, GUIDANCE, "fp32", model.encode_prompts([""]), MicroBatch(2))
    found = generate(model, model.encode_prompts(PROMPTS), torch.arange(2), torch.tensor(SEEDS[:2]), sampling)
    torch.testing.assert_close(packed(pipe, found), latents["latents"], rtol=1e-4, atol=1e-4)
    decoded = model.decode(found)
    assert decoded.shape[1:3] == SIZE
    torch.testing.assert_close(decoded, images, rtol=1e-4, atol=1e-4)


def test_a_run_of_several_sizes_goes_on_with_them(tiny, recipe, tmp_path, inside):
    """Each iteration has one; evaluations have their own; a resumed run ends with the same bits."""
    settings = ["rollout.resolution=[[96, 64], [64, 96], 64]", "evaluate.resolution=[64, 128]"]
    settings += ["rewards={tests.models.test_sizes:shape: 1}", "train.iterations=3", "checkpoint.every=1"]
    settings += ["evaluate.every=3", "evaluate.steps=1", "evaluate.guided_base=false"]
    wanted, seen = recipe(tiny("sd3"), short("sd3"), *settings), {}
    shapes.clear()
    assert Trainer(wanted, tmp_path / "whole").run()
    seen["whole"] = list(shapes)
    assert seen["whole"][1] == seen["whole"][-1] == (64, 128)  # after the one that tries the reward out
    rollouts = seen["whole"][2:-1]
    assert sorted(set(rollouts)) == [(64, 64), (64, 96), (96, 64)]
    assert rollouts == [size for size in rollouts[::2] for _ in range(2)]  # one for each prompt
    with Image.open(tmp_path / "whole" / "samples" / "000003.png") as grid:
        assert grid.size == (2 * 128, 64)

    first = build_recipe(wanted.model_dump(), ["train.iterations=1", "evaluate.every=0"])
    assert Trainer(first, tmp_path / "run").run()
    shapes.clear()
    assert Trainer(wanted, tmp_path / "run", resume=True).run()
    assert shapes[1:-1] == rollouts[2:]
    ends = [
        load_file(tmp_path / name / "checkpoints" / "iteration-000003" / "training.safetensors")
        for name in ("whole", "run")
    ]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())

    grid = tmp_path / "grid.png"
    sample_grid(str(tmp_path / "run"), PROMPTS[:1], grid, samples=2)
    assert np.asarray(Image.open(grid)).shape == (64, 256, 3)
    sample_grid(str(tmp_path / "run"), PROMPTS[:1], tmp_path / "small.png", samples=1, size=32)
    assert np.asarray(Image.open(tmp_path / "small.png")).shape == (32, 32, 3)
    one = ("--samples", 1, "--steps", 1, "--size", "96x32")
    (tmp_path / "p.txt").write_text(PROMPTS[0])
    tall = tmp_path / "tall.png"
    code, _, errors = inside("sample", tmp_path / "run", *one, "--prompts", tmp_path / "p.txt", "--out", tall)
    assert code == 0 and np.asarray(Image.open(tall)).shape == (96, 32, 3), errors
    asked = (*one, "--prompts", tmp_path / "p.txt", "--json", tmp_path / "tall.json", "--allow-code")
    code, _, errors = inside("eval", tmp_path / "run", *asked)
    assert code == 0 and json.loads((tmp_path / "tall.json").read_text())["resolution"] == [96, 32], errors
    code, _, errors = inside("report", tmp_path / "run")
    assert code == 0, errors
    out = tmp_path / "hub"
    code, _, errors = inside("export", tmp_path / "run", "--to", "hub", "--out", out)
    assert code == 0 and "height=64, width=128" in (out / "README.md").read_text(), errors


def test_sizes_that_do_not_fit(tiny, recipe):
    for key, size, words in [
        ("rollout.resolution", "[64, 72]", r"rollout\.resolution: expected a multiple of 16 .* got 72"),
        ("rollout.resolution", "[[64, 96], [512, 64]]", r"rollout\.resolution: expected at most 256 .* 512"),
        ("evaluate.resolution", "[72, 64]", r"evaluate\.resolution: expected a multiple of 16 .* got 72"),
    ]:
        with pytest.raises(UserError, match=words):
            load_model(recipe(tiny("sd3"), f"{key}={size}"))


def test_how_sizes_are_written(recipe, tmp_path):
    for written, size in [("64", 64), ("[64, 64]", 64), ("[96, 64]", (96, 64)), ("[[64, 96]]", (64, 96))]:
        assert recipe(tmp_path, f"rollout.resolution={written}").rollout.sizes == [size]
        if not written.startswith("[["):
            assert recipe(tmp_path, f"evaluate.resolution={written}").evaluation_size == size
    for written, size in [("64", 64), ("96x64", (96, 64)), ("96X64", (96, 64)), ("64x64", 64)]:
        assert size_of_text(written) == size
    for written in ("", "64x", "64x64x64", "-64", "4x64", "6_4", "9" * 5000):
        with pytest.raises(ValueError, match="expected"):
            size_of_text(written)
    several = recipe(tmp_path, "rollout.resolution=[64, [64, 64], 96, [96, 64]]")
    assert several.rollout.sizes == [64, 96, (96, 64)] and several.evaluation_size == 64
    (tmp_path / "copy.yaml").write_text(several.to_yaml())
    from crd_fast.config import load_recipe

    assert load_recipe(tmp_path / "copy.yaml") == several
    turns = [several.size_of(iteration) for iteration in range(30)]
    assert all(set(turns[i : i + 3]) == set(several.rollout.sizes) for i in range(0, 30, 3))
    assert turns[:3] != turns[3:6] or turns[:3] != turns[6:9]


def test_a_plan_has_the_largest_size_and_the_mean_time(tiny, recipe):
    def planned(*settings):
        made = recipe(tiny("sd3"), "evaluate.every=1", *settings)
        plan = Planner(made).plan(2, 2)
        return plan, cost(made, plan, None)

    (tall, at_tall), (wide, _) = (
        planned("rollout.resolution=[96, 64]"),
        planned("rollout.resolution=[64, 96]"),
    )
    assert tall.flops == wide.flops and tall.peak == wide.peak
    small, at_small = planned("rollout.resolution=64")
    assert tall.row_flops["sampler"] > 1.02 * small.row_flops["sampler"]
    both, at_both = planned("rollout.resolution=[64, [96, 64]]")
    assert both.phases == tall.phases
    for kind, flops in both.row_flops.items():
        assert flops == pytest.approx((tall.row_flops[kind] + small.row_flops[kind]) / 2)
    assert at_both.evaluation_flops == at_small.evaluation_flops < at_tall.evaluation_flops
    large, at_large = planned("rollout.resolution=64", "evaluate.resolution=[96, 64]")
    assert large.row_flops == small.row_flops and at_large.evaluation_flops == at_tall.evaluation_flops
    assert (
        large.phases["decode"] == tall.phases["decode"] and large.phases["update"] == small.phases["update"]
    )
