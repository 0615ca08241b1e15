"""Runs that are used from another folder, and whose model has moved meanwhile."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from crd_fast.config import build_recipe, read_yaml
from crd_fast.errors import UserError
from crd_fast.train.inference import Source, asked, evaluated, sample_grid
from crd_fast.train.places import absolute
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint

SETTINGS = ("train.iterations=1", "evaluate.every=1", "evaluate.steps=2", "rewards={colorfulness: 1.0}")


@pytest.fixture
def moved(tiny, recipe, prompts_file, tmp_path, monkeypatch):
    """A run by relative paths and by one's home, seen from another folder. Returns where things were."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    monkeypatch.setenv("HOME", str(there))
    shutil.copytree(tiny("sd3"), "sd3")
    shutil.copy(prompts_file, "prompts.txt")
    places = ("model.path=sd3", "rollout.prompts=prompts.txt", "evaluate.prompts=~/prompts.txt")
    assert Trainer(recipe("sd3", *places, *SETTINGS), Path("run")).run()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return there


def metrics(run, base=None):
    return next(evaluated([asked(Source.of(str(run), base))])).metrics


def test_it_works_from_anywhere_and_says_where_its_model_was(moved, inside, tmp_path, caplog):
    run = moved / "run"
    config = read_yaml(run / "config.yaml")
    assert config["model"]["path"] == str(moved / "sd3")
    assert config["evaluate"]["prompts"] == str(moved / "prompts.txt")
    assert config["rollout"]["prompts"] == str(moved / "prompts.txt")
    wanted = metrics(run)
    sample_grid(str(run), ["a red circle"], Path("grid.png"), samples=1, steps=1)

    (moved / "sd3").rename(tmp_path / "base")
    for arguments in (
        ("sample", run, "--prompt", "a red circle", "--out", "new.png"),
        ("eval", run),
        ("train", "--resume", run, "--max-iterations", 2),
    ):
        code, _, err = inside(*arguments)
        error = err.strip().splitlines()[-1]
        assert code == 2 and "--model" in error and str(moved / "sd3") in error, err
    base = str(tmp_path / "base")
    assert metrics(run, base) == wanted
    code, _, err = inside(
        "sample",
        run,
        "--prompt",
        "a red circle",
        "--out",
        "new.png",
        "--model",
        base,
        "--samples",
        1,
        "--steps",
        1,
    )
    assert code == 0, err
    assert Path("new.png").read_bytes() == Path("grid.png").read_bytes()
    code, _, err = inside("train", "--resume", run, "--max-iterations", 2, "--model", "../base")
    assert code == 0, err
    assert "changed: model.path" in caplog.text and "changed: train.iterations 1 -> 2" in caplog.text
    assert read_yaml(run / "config.yaml")["model"]["path"] == base
    assert checkpoint.newest(run / "checkpoints").name == "iteration-000002"


def test_another_base_of_the_same_shape_is_no_moved_one(moved, tmp_path, caplog):
    """Pictures of it are another model's, which is said; a run does not go on with it."""
    run = moved / "run"
    sample_grid(str(run), ["a red circle"], Path("own.png"), samples=1, steps=1)
    assert "another base" not in caplog.text
    other = shutil.move(moved / "sd3", tmp_path / "other")
    (weights,) = (other / "transformer").glob("*.safetensors")
    save_file({name: 1.1 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    sample_grid(str(run), ["a red circle"], Path("other.png"), samples=1, steps=1, base=str(other))
    assert f"files in {other} are not those that it was trained on: another base gives" in caplog.text
    recipe = build_recipe(read_yaml(run / "config.yaml"), [f"model.path={other}", "train.iterations=2"])
    with pytest.raises(UserError, match="are not those that it was trained on; expected the same"):
        Trainer(recipe, run, resume=True)


def test_what_may_not_change_is_refused_on_the_command_line(moved, inside):
    code, _, err = inside("train", "--resume", moved / "run", "--set", "train.seed=7", "--seed", "8")
    assert code == 2 and "train.seed 42 -> 8" in err


def test_home_in_a_recipe(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = build_recipe({"model": {"path": "~/sd3"}, "rollout": {"prompts": "~/p.txt"}})
    assert (recipe.model.path, recipe.rollout.prompts) == ("/home/somebody/sd3", "/home/somebody/p.txt")


def test_a_grid_is_never_written_over_another(moved):
    Path("grid.png").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        sample_grid(str(moved / "run"), ["a red circle"], Path("grid.png"), samples=1, steps=1)
    assert Path("grid.png").read_text() == "mine"


def test_features_are_of_the_folder_that_the_run_began_with(tmp_path, monkeypatch):
    """And those of a network with random weights of none."""
    monkeypatch.chdir(tmp_path)

    def found(features):
        return absolute(build_recipe({"evaluate": {"drift": 4.5, "features": features}})).evaluate.features

    assert found("clip") == "clip"  # an id on the hub
    for name in ("clip", "random"):
        (tmp_path / name).mkdir()
    assert found("clip") == str(tmp_path / "clip") and found("random") == "random"


def test_a_lora_to_begin_with_is_found_from_anywhere(tmp_path, monkeypatch):
    """A run that is stopped before its first checkpoint begins with it again."""
    monkeypatch.chdir(tmp_path)
    settings = {"model": {"path": "org/name", "init_lora": "lora.safetensors"}}
    assert absolute(build_recipe(settings)).model.init_lora == "lora.safetensors"  # which is then missed
    Path("lora.safetensors").touch()
    assert absolute(build_recipe(settings)).model.init_lora == str(tmp_path / "lora.safetensors")
