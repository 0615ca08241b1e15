"""What CONTRIBUTING.md lists is all it takes to add another method."""

import json
import os
import re
import subprocess
import sys

import pytest

from crd_fast.schema import LossConfig
from crd_fast.train.objectives import OBJECTIVES, Objective
from tests.rewards.test_adding_a_reward import ROOT, listed, package  # noqa: F401

METHOD = '''
class Push(Objective):
    """Towards samples of positive advantage, away from others: the mean of A (policy - target)^2."""

    needs_old = False

    def coefficients(self, stats, pairs, denominator):
        advantage, kl = pairs.advantage.double(), pairs.anchor.double() * self.loss.kl_beta
        policy_loss = (advantage * stats.policy_error.double()).sum() / denominator
        kl_loss = (kl * stats.kl.double()).sum() / denominator
        c1, c2 = (2 * strength.float() / (stats.elements * denominator) for strength in (advantage, kl))
        return crd_kernels.Coefficients(policy_loss + kl_loss, policy_loss, kl_loss, c1, c2)


OBJECTIVES["push"] = Push
'''
TRAIN = """
import json, sys
from pathlib import Path
from crd_fast.config import build_recipe
recipes = [build_recipe({
    "rewards": {"colorfulness": 1.0},
    "rollout": {"prompts_per_iteration": 2, "samples_per_prompt": 3, "steps": 2},
    "train": {"steps_per_iteration": 1, "timesteps": 1, "precision": "fp32", "micro_batch": int(micro_batch)},
    "loss": {"method": "push"},
}) for micro_batch in sys.argv[2:]]
from crd_fast.train.trainer import Trainer
folders = [Path(sys.argv[1], name) for name in sys.argv[2:]]
print(json.dumps([Trainer(recipe, folder).iterate() for recipe, folder in zip(recipes, folders)]))
"""


def add(package, path):  # noqa: F811
    """What the checklist asks for in this file."""
    file = package / path
    text = file.read_text(encoding="utf-8")
    if path.endswith("schema.py"):
        text, count = re.subn(r"(    method: Literal\[\"crd\")", r'\1, "push"', text)
        assert count == 1
    else:
        text += METHOD
    file.write_text(text, encoding="utf-8")


@pytest.fixture
def train(package, tmp_path):  # noqa: F811
    """An iteration by the package at each of the micro-batches: their metrics, or what went wrong."""
    (package / "crd_fast" / "builtin" / "transformer.safetensors").symlink_to(
        ROOT / "crd_fast" / "builtin" / "transformer.safetensors"
    )
    (package / "crd_fast" / "builtin" / "text_encoder.safetensors").symlink_to(
        ROOT / "crd_fast" / "builtin" / "text_encoder.safetensors"
    )
    environment = {**os.environ, "PYTHONPATH": str(package)}

    def run(*micro_batches):
        command = [sys.executable, "-c", TRAIN, str(tmp_path / "runs"), *map(str, micro_batches)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr

    return run


def test_two_files_make_a_method(package, train):  # noqa: F811
    paths = listed("Adding a method")
    assert paths == ["crd_fast/train/objectives.py", "crd_fast/schema.py"]
    assert "expected 'crd'" in train(6)
    for path in paths:
        add(package, path)
    whole, split = train(6, 2)
    assert whole["grad_norm"] > 0 and "old_kl" not in whole
    for name in ("grad_norm", "policy_loss", "kl"):
        assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)


def test_a_method_without_coefficients_is_none():
    class Unfinished(Objective):
        pass

    with pytest.raises(TypeError, match=r"Unfinished .*abstract method '?coefficients"):
        Unfinished(LossConfig(), 5.0)
    for kind in OBJECTIVES.values():
        kind(LossConfig(), 5.0)
