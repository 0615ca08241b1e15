"""What CONTRIBUTING.md lists is all it takes to ship another reward."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
REWARD = '''
"""How bright pictures are."""


class Brightness:
    """`floor`: what counts as black, of 255."""

    def __init__(self, floor: int = 0):
        self.floor = floor

    def score(self, images, prompts, metadata):
        return [float(image.clip(min=self.floor).mean()) / 255 for image in images]
'''


def listed(heading):
    """The package's files that are named under a heading as what is new or changed."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\d\. `(crd_fast/[\w/.]+)`", section, re.MULTILINE)


@pytest.fixture
def package(tmp_path):
    """A copy without the models' weights."""
    leave = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "crd_fast", tmp_path / "crd_fast", ignore=leave)
    return tmp_path


def add(package, path):
    """What the checklist asks for in this file."""
    file = package / path.replace("NAME", "brightness")
    if not file.exists():
        file.write_text(REWARD)
        return
    text = file.read_text()
    line = '    "brightness": "crd_fast.rewards.brightness:Brightness",\n'
    file.write_text(text.replace("REWARDS = {\n", "REWARDS = {\n" + line, 1))


def test_two_files_make_a_reward(package, tmp_path):
    paths = listed("Adding a reward")
    assert paths == ["crd_fast/rewards/NAME.py", "crd_fast/rewards/registry.py"]
    for path in paths:
        add(package, path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, value in (("a", 51), ("b", 255)):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(pictures / f"{name}.png")
    (tmp_path / "prompts.txt").write_text("a dark wall\na white wall\n")

    arguments = ["--images", "pictures", "--prompts", "prompts.txt"]
    environment = {**os.environ, "PYTHONPATH": str(package)}

    def score(name, *more):
        command = [sys.executable, "-m", "crd_fast", "score", "--reward", name, *arguments, *more]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    scored = score("brightness", "--set", "floor=102", "--json", "out.json")
    assert scored.returncode == 0, scored.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert [row["score"] for row in rows] == [0.4, 1.0]
    refused = score("brightnes")
    assert refused.returncode == 2 and "did you mean" in refused.stderr and "brightness" in refused.stderr
