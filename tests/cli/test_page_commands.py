"""The pages' commands, run as they are printed on a tiny pipeline, from `init` to the LoRA in diffusers.

A model's name becomes the tiny pipeline's folder, and settings make it short; nothing else is changed.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.models.conftest import own_cache, tiny  # noqa: F401
from tests.test_docs import BLOCK, PAGES, ROOT, commands

# Commands that are not run here, each with the test that does, or why none can.
ELSEWHERE = {
    "doctor": "cli/test_doctor.py",
    "serve-reward": "rewards/test_server.py",
    "score --reward ocr": "rewards/test_score.py",
    "eval runs/... --benchmark geneval": "rewards/test_geneval_benchmark.py",
    "plan --set model.path=flux.1-dev": "plan/test_plan.py",
    "train my.yaml --set rewards.http": "rewards/test_http.py",
    "train flux.1-dev-12gb": "wants published weights",
    "train my.yaml --set model.path": "wants published weights",
}
SETTINGS = (
    *("rollout.resolution=64", "rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=3"),
    *("train.iterations=2", "train.learning_rate=0.01", "evaluate.max_prompts=4", "evaluate.steps=3"),
)
SMALL = {
    "plan": [word for setting in SETTINGS for word in ("--set", setting)],
    "train": [word for setting in SETTINGS for word in ("--set", setting)],
    "eval": ["--steps", "2", "--size", "64"],
    "sample": ["--steps", "2", "--samples", "2"],
}
# What stands for what is too large, or is made by another command.
WORDS = {"--size 768x512": "--size 96x64", "--checkpoint 400": "--checkpoint 2", "pickscore": "colorfulness"}
WORDS |= {"my.safetensors": "my-lora.safetensors", "my.yaml": "recipe.yaml"}
FIRST = ("docs/quickstart.md", "README.md", "docs/using-the-lora.md")  # in the order of a user's work


def printed():
    """(page, arguments) of the pages' commands, each once."""
    found = {}
    others = (str(page.relative_to(ROOT)) for page in PAGES)
    for name in [*FIRST, *(name for name in others if name not in FIRST)]:
        for language, text in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
            for arguments in commands(text) if language == "bash" else ():
                found.setdefault(shlex.join(arguments), name)
    return [(page, command) for command, page in found.items()]


def is_elsewhere(command):
    return any(command.replace("'", "").startswith(start) for start in ELSEWHERE)


def test_what_runs_elsewhere_is_there():
    everything = [command.replace("'", "") for _, command in printed()]
    for start, where in ELSEWHERE.items():
        assert any(command.startswith(start) for command in everything), f"{start}: on no page any more"
        assert not where.endswith(".py") or (ROOT / "tests" / where).is_file(), where


@pytest.mark.slow
def test_the_commands_of_the_pages(inside, tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    ran = []
    for page, command in printed():
        if is_elsewhere(command):
            continue
        for words, instead in WORDS.items():
            command = re.sub(rf"(?<![\w-]){re.escape(words)}(?![\w-])", instead, command)
        name, *arguments = shlex.split(command)
        arguments = [str(tiny("sd3")) if word == "sd3.5-medium" else word for word in arguments]
        if (name, *arguments) in ran:  # two names of one
            continue
        ran.append((name, *arguments))
        code, _, errors = inside(name, *arguments, *([] if "--resume" in arguments else SMALL.get(name, [])))
        assert code == 0, f"{page}: crd-fast {command}: {errors}"
        if name == "init":
            monkeypatch.chdir("my-run")
            furnish(tiny("sd3"))
    assert len(ran) >= 17 and {name for name, *_ in ran} >= {"init", "score", "plan", "train", "report"}
    assert Path("run/report.html").read_text(encoding="utf-8").count("naturalness") > 1
    assert (picture(tiny("sd3"), "my-lora") - picture(tiny("sd3"))).abs().max() > 1e-3


def furnish(pipeline):
    """What a user has beside what `init` wrote."""
    lines = Path("prompts.txt").read_text(encoding="utf-8").splitlines()[:4]
    Path("prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    shutil.copytree(pipeline, "pipeline")
    Path("pictures").mkdir()
    for number in range(len(lines)):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number}.png")


def picture(pipeline, lora=None):
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return torch.from_numpy(pipe("a photo of a red bicycle", **settings).images)
