"""The quickstart on a tiny pipeline of the real classes, from `init` to the LoRA in diffusers."""

import sys

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.models.conftest import own_cache, tiny  # noqa: F401

SMALL = (
    *("rollout.resolution=64", "rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=3"),
    *("train.iterations=2", "train.learning_rate=0.01", "evaluate.max_prompts=4", "evaluate.steps=3"),
)


@pytest.mark.slow
def test_from_init_to_the_exported_lora(inside, tiny, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "my-run"

    def run(*arguments):
        code, out, errors = inside(*arguments)
        assert code == 0, errors
        return out

    small = [word for setting in SMALL for word in ("--set", setting)]
    run("init", folder, "--model", tiny("sd3"), "--gpu", "24GB", "--reward", "mine")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "fits" in run("plan", "recipe.yaml", *small, "--gpu", "24GB")
    assert "report:" in run("train", "recipe.yaml", *small, "--output", "run")
    assert "report:" in run("report", "run")
    assert (folder / "run" / "report.html").read_text(encoding="utf-8").count("naturalness") > 1
    run(
        "sample",
        "run",
        "--prompt",
        "a photo of a red bicycle",
        "--samples",
        "2",
        "--steps",
        "2",
        "--out",
        "grid.png",
    )
    assert "my_reward.py:score" in run("eval", "run", tiny("sd3"), "--allow-code")
    run("export", "run", "--to", "diffusers", "--out", "lora")

    pipe = DiffusionPipeline.from_pretrained(tiny("sd3"))
    pipe.set_progress_bar_config(disable=True)

    def picture():
        seed = torch.Generator().manual_seed(0)
        settings = {
            "height": 64,
            "width": 64,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "generator": seed,
        }
        return torch.from_numpy(pipe("a photo of a red bicycle", output_type="np", **settings).images)

    before = picture()
    pipe.load_lora_weights("lora")
    assert (picture() - before).abs().max() > 1e-3
