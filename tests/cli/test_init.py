"""What `crd-fast init` writes can be used as it is."""

import subprocess
import sys

import pytest

from crd_fast.config import WORLD_REWARDS, load_recipe
from crd_fast.plan.planner import Planner
from crd_fast.rewards import REWARDS, load
from tests.models.conftest import tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs

SMALL = (
    *("--set", "rollout.prompts_per_iteration=2", "--set", "rollout.samples_per_prompt=2"),
    *("--set", "rollout.steps=2", "--set", "evaluate.steps=2", "--set", "evaluate.max_prompts=2"),
    *("--set", "train.iterations=1", "--set", "train.timesteps=1"),
)


def test_a_reward_of_ones_own_from_the_first_command_to_a_run(inside, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    code, out, errors = inside("init", folder, "--model", "builtin")
    assert code == 0, errors
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "my_reward.py", "test_my_reward.py"}
    assert f"cd {folder}" in out and "crd-fast train recipe.yaml" in out
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], capture_output=True
    )
    assert own.returncode == 0, own.stdout
    code, out, errors = inside("train", "recipe.yaml", *SMALL, "--output", tmp_path / "run")
    assert code == 0, errors
    assert (
        f"weights: {tmp_path / 'run' / 'checkpoints'}" in out and f"crd-fast eval {tmp_path / 'run'}" in out
    )
    assert '"reward/my_reward.py:score"' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "options, base, path",
    [
        (("--gpu", "rtx-4090"), "sd3.5-medium-24gb", "stabilityai/stable-diffusion-3.5-medium"),
        (("--gpu", "l4"), "sd3.5-medium-16gb", "stabilityai/stable-diffusion-3.5-medium"),
        (
            ("--gpu", "h100", "--reward", "ocr"),
            "sd3.5-medium-80gb",
            "stabilityai/stable-diffusion-3.5-medium",
        ),
        (("--model", "flux.1-dev", "--gpu", "20GB"), "flux.1-dev-16gb", "black-forest-labs/FLUX.1-dev"),
        (("--model", "black-forest-labs/flux.1-dev"), "flux.1-dev-24gb", "black-forest-labs/FLUX.1-dev"),
        (("--model", "builtin-ocr", "--reward", "ocr"), "builtin-ocr", "builtin-ocr"),
        (("--model", "sana-1.6b", "--reward", "geneval_mask2former"), "sana-1.6b-24gb", None),
        (("--model", "sana-1.6b", "--reward", "easyocr"), "sana-1.6b-24gb", None),
        (("--model", "sana-1.6b", "--reward", "naturalness"), "sana-1.6b-24gb", None),
        (("--model", "builtin", "--reward", "diversity"), "builtin", None),
    ],
)
def test_recipes(inside, tmp_path, monkeypatch, options, base, path):
    code, out, errors = inside("init", tmp_path, *options)
    assert code == 0, errors
    monkeypatch.chdir(tmp_path)
    recipe, extended = load_recipe("recipe.yaml"), load_recipe(base)
    assert recipe.model == extended.model and recipe.model.path == (path or extended.model.path)
    assert recipe.train == extended.train and recipe.loss == extended.loss
    assert recipe.rollout.model_copy(update={"prompts": ""}) == extended.rollout.model_copy(
        update={"prompts": ""}
    )
    recipe.check_own(trains=True, evaluates=True)
    assert recipe.eval_rewards and not recipe.eval_rewards.keys() & recipe.rewards.keys()
    assert recipe.evaluate.samples_per_prompt == 1 + ("diversity" in recipe.rewards)  # it compares them
    if "easyocr" in recipe.rewards:  # as `ocr`: whole pictures of prompts that ask for a word
        assert recipe.rewards["easyocr"]["mode"] == "scene" and recipe.rollout.prompts == "ocr-words"
    assert ("hf auth login" in out) == (path is not None and path.startswith(("stabilityai", "black-forest")))
    if base == "builtin-ocr":
        assert recipe.rewards == extended.rewards and Planner(recipe).plan().peak > 0


def test_the_folder_of_a_pipeline(inside, tiny, tmp_path, monkeypatch):  # noqa: F811
    code, out, errors = inside("init", tmp_path / "mine", "--model", tiny("flux"), "--gpu", "12GB")
    assert code == 0, errors
    monkeypatch.chdir(tmp_path / "mine")
    recipe, extended = load_recipe("recipe.yaml"), load_recipe("flux.1-dev-12gb")
    assert recipe.model == extended.model.model_copy(update={"path": str(tiny("flux"))})
    assert recipe.train == extended.train and "hf auth" not in out
    (tmp_path / "none").mkdir()
    code, _, errors = inside("init", tmp_path / "new", "--model", tmp_path / "none")
    assert code == 2 and "expected a diffusers pipeline, found no model_index.json" in errors


def test_pictures_no_larger_than_the_folders_model_draws(inside, tiny, tmp_path, monkeypatch):  # noqa: F811
    """Where the recipe for the card has larger ones: the plan and the run take what was written."""
    code, _, errors = inside("init", tmp_path / "mine", "--model", tiny("sd3"))
    assert code == 0, errors
    monkeypatch.chdir(tmp_path / "mine")
    recipe, extended = load_recipe("recipe.yaml"), load_recipe("sd3.5-medium-24gb")
    assert (recipe.rollout.resolution, extended.rollout.resolution) == (256, 512)
    changed = recipe.rollout.model_copy(update={"resolution": 512, "prompts": extended.rollout.prompts})
    assert changed == extended.rollout
    assert Planner(recipe).plan().peak > 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text((tiny("sd3") / "model_index.json").read_text())
    code, _, errors = inside("init", tmp_path / "new", "--model", tmp_path / "broken")
    assert code == 2 and "config.json is missing" in errors
    assert not (tmp_path / "new").exists()


def test_every_reward_has_the_settings_that_it_needs(inside, tmp_path):
    for name in REWARDS.keys() - set(WORLD_REWARDS):
        code, _, errors = inside("init", tmp_path / name, "--reward", name)
        assert code == 0, errors
        ((found, value),) = load_recipe(tmp_path / name / "recipe.yaml").rewards.items()
        assert found == name and load(name, value if isinstance(value, dict) else None)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "flux1"), "--model: no recipe ships for 'flux1', did you mean 'flux.1-dev'?"),
        (("--model", "./nowhere"), "no recipe ships for './nowhere', and there is no such folder; known: "),
        (("--gpu", "6GB"), "the smallest recipe of sd3.5-medium is for 8 GB"),
        (("--gpu", "rtx-4091"), "rtx-4090"),
        (("--reward", "geneval_strict"), "builtin-ocr alone; for other models: geneval_mask2former"),
        (("--reward", "texture_fooled"), "--reward texture_fooled: scores pictures of builtin"),
        (("--reward", "picscore"), "unknown reward 'picscore', did you mean 'pickscore'?"),
    ],
)
def test_what_is_refused_writes_nothing(inside, tmp_path, options, message):
    code, _, errors = inside("init", tmp_path / "new", *options)
    assert code == 2 and message in errors
    assert not (tmp_path / "new").exists()


def test_what_is_to_be_typed_can_be(inside, tmp_path):
    code, out, errors = inside("init", tmp_path / "my folder", "--gpu", "RTX 4090")
    assert code == 0, errors
    assert f"cd '{tmp_path / 'my folder'}'" in out and "plan recipe.yaml --gpu 'RTX 4090'" in out
    assert "--gpu 'RTX 4090'" in (tmp_path / "my folder" / "recipe.yaml").read_text()


def test_nothing_is_overwritten(inside, tmp_path):
    (tmp_path / "prompts.txt").write_text("mine\n")
    code, _, errors = inside("init", tmp_path)
    assert code == 2 and "prompts.txt: already exists" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
