"""Rewards by name, with settings, in a recipe and through the command line."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.prompts.source import PromptSource
from crd_fast.rewards import REWARDS, Rewards, load
from crd_fast.rewards.registry import whole_prompts
from tests.cli.conftest import SMALL, metrics

MINE = '''
import threading
import time

calls = []
devices = []


def redness(images, prompts, metadata):
    """The example of the README."""
    calls.append((threading.current_thread().name, list(prompts)))
    return [float(image[..., 0].mean()) / 255 for image in images]


def scaled(images, prompts, metadata, scale=1.0):
    return [scale * value for value in redness(images, prompts, metadata)]


class Thing:
    def __init__(self, sharpness: float, mode="fast"):
        if mode not in ("fast", "slow"):
            raise ValueError(f"mode: expected fast or slow, got {mode!r}")
        self.sharpness = sharpness

    def setup(self, device):
        devices.append(device)

    def score(self, images, prompts, metadata):
        return [self.sharpness] * len(images)


class Patient:
    """Has a timeout of its own."""

    def __init__(self, timeout=3.0):
        self.timeout = timeout

    def score(self, images, prompts, metadata):
        return [self.timeout] * len(images)


def slow(images, prompts, metadata):
    time.sleep(60)


def third_time(images, prompts, metadata):
    calls.append(None)
    if len(calls) > 5:
        raise RuntimeError("no more")
    return [float(i) for i in range(len(images))]


constant = 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's module of rewards in the current folder."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda: sys.modules["mine"]
    sys.modules.pop("mine", None)


def assert_refused(result, *words):
    code, _, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    for word in words:
        assert word in err


def pictures(*reds):
    images = np.zeros((len(reds), 4, 4, 3), dtype=np.uint8)
    images[..., 0] = np.array(reds)[:, None, None]
    return images


def entries(count, prompt="a"):
    return [{"prompt": prompt}] * count


def test_functions_and_classes_with_settings(mine):
    rewards = Rewards(
        {
            "mine:redness": 0.5,
            "mine:scaled": {"weight": 2.0, "scale": 10.0},
            "mine:Thing": {"sharpness": 7.0},
        },
        device="meta",
    )
    assert mine().devices == ["meta"]
    assert rewards.weights == {"mine:redness": 0.5, "mine:scaled": 2.0, "mine:Thing": 1.0}
    values = rewards.score(pictures(0, 255), entries(2))
    assert {name: value.tolist() for name, value in values.items()} == {
        "mine:redness": [0.0, 1.0],
        "mine:scaled": [0.0, 10.0],
        "mine:Thing": [7.0, 7.0],
    }
    assert rewards.combined(values).tolist() == [7.0, 27.5]
    assert rewards.report(pictures(0, 255), entries(2), values)["reward_mean"] == 17.25


def brightness(images, prompts, metadata):
    return [float(image.max()) / 255 for image in images]


class Constant:
    def __init__(self, value):
        self.value = value

    def score(self, images, prompts, metadata):
        return [self.value] * len(images)


def test_rewards_themselves_in_the_place_of_names():
    def local(images, prompts, metadata, scale=1.0):
        return [scale] * len(images)

    mine = f"{__name__}:brightness"
    settings = {"weight": 2.0, "scale": 3.0}
    rewards = Rewards({brightness: 0.5, local: settings, Constant(4.0): 1.0, Constant: {"value": 5}})
    assert rewards.weights == {mine: 0.5, "local": 2.0, "Constant": 1.0, f"{__name__}:Constant": 1.0}
    values = rewards.score(pictures(0, 255), entries(2))
    assert [value.tolist() for value in values.values()] == [[0, 1], [3, 3], [4, 4], [5, 5]]
    for wrong, words in [
        ({Constant(1): 1.0, Constant(2): 1.0}, "expected names that differ, got 'Constant' twice"),
        ({brightness: {"colour": 1}}, "unknown setting 'colour'"),
        ({Constant(1): {"value": 2}}, "reward Constant: unknown setting 'value'"),
        ({3: 1.0}, "expected a name, a function, a class or an object with score, got int"),
    ]:
        with pytest.raises(UserError, match=words):
            Rewards(wrong)


def test_a_trainer_takes_rewards_themselves(tmp_path):
    from crd_fast.train.trainer import Trainer

    recipe = load_recipe(recipe_file(tmp_path, ""), ("evaluate.every=0", "train.iterations=1"))
    trainer = Trainer(recipe, tmp_path / "run", rewards={brightness: 2.0})
    assert trainer.run()
    record = metrics(tmp_path / "run")[0]
    assert record["reward_mean"] == pytest.approx(2 * record[f"reward/{__name__}:brightness"])
    kept = load_recipe(tmp_path / "run" / "config.yaml")
    assert kept.rewards == {f"{__name__}:brightness": 2.0}


def test_timeout_and_retries_are_the_engine_s_unless_the_reward_has_them(mine):
    _, engine = load("mine:redness", {"timeout": 5, "retries": 0, "weight": 3})
    assert engine == {"timeout": 5.0, "retries": 0}
    reward, engine = load("mine:Patient", {"timeout": 5.0})
    assert reward.timeout == 5.0 and engine == {}


def test_an_address_is_the_reward_that_is_served_there():
    reward, engine = load("http://127.0.0.1:8701", {"timeout": 5.0})
    assert type(reward).__name__ == "HttpReward" and engine == {}
    assert (reward.url, reward.timeout) == ("http://127.0.0.1:8701", 5.0)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("genevil", {}, "unknown reward 'genevil', did you mean 'geneval'?"),
        ("ocr_dens", {}, "did you mean 'ocr_dense'?"),
        ("mine:nothing", {}, "'mine:nothing' cannot be imported"),
        ("nothing:here", {}, "'nothing:here' cannot be imported"),
        ("mine:constant", {}, "expected a function or a class, got int"),
        (
            "mine:Thing",
            {"sharpnes": 1.0},
            "reward mine:Thing: unknown setting 'sharpnes', did you mean 'sharpness'?",
        ),
        ("mine:Thing", {}, "reward mine:Thing: "),  # the argument that is missing
        (
            "mine:Thing",
            {"sharpness": 1, "mode": "odd"},
            "reward mine:Thing: mode: expected fast or slow, got 'odd'",
        ),
        ("mine:scaled", {"scal": 1.0}, "did you mean 'scale'?"),
        ("mine:redness", {"scale": 1.0}, "unknown setting 'scale'"),
        ("mine:redness", {"timeout": 0}, "timeout: expected a number of seconds > 0, got 0"),
        ("mine:redness", {"retries": -1}, "retries: expected a whole number >= 0, got -1"),
        ("diversity", {"mode": "word"}, "reward diversity: unknown setting 'mode'"),
    ],
)
def test_mistakes_in_the_recipe_are_one_line(mine, name, settings, words):
    with pytest.raises(UserError) as error:
        Rewards({name: settings})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "section, value, words",
    [
        ("rewards", {"ocr": "much"}, "rewards: ocr: expected a weight or settings, got 'much'"),
        ("rewards", {"ocr": {"weight": "much"}}, "rewards: ocr: expected a weight or settings, got 'much'"),
        ("rewards", {"ocr": True}, "rewards: ocr: expected a weight or settings, got True"),
        ("rewards", {"ocr": {"weight": float("inf")}}, "rewards: ocr: expected a finite weight, got inf"),
        ("rewards", {}, "rewards: expected at least one reward"),
        ("eval_rewards", {"ocr": None}, "eval_rewards: ocr: expected a weight or settings, got None"),
    ],
)
def test_weights_that_are_none(section, value, words):
    with pytest.raises(UserError) as error:
        build_recipe({section: value})
    assert words in str(error.value)


def test_a_recipe_with_settings_survives_yaml(tmp_path):
    recipe = build_recipe(
        {
            "rewards": {"ocr": {"weight": 0.5, "mode": "word"}, "geneval": 1},
            "eval_rewards": {"diversity": {}},
        },
        ["rewards.colorfulness={weight: 2, timeout: 3}"],
    )
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "copy.yaml") == recipe
    assert recipe.rewards["colorfulness"] == {"weight": 2, "timeout": 3}


@pytest.mark.parametrize("name", REWARDS)
def test_every_shipped_name_leads_to_a_class(name):
    module, _, attribute = REWARDS[name].partition(":")
    text = Path(importlib.util.find_spec(module).origin).read_text()  # its packages may be missing here
    assert f"class {attribute}" in text


def test_calls_part_no_prompt():
    prompts = ["a"] * 30 + ["b"] * 30 + ["c"] * 30 + ["d"] * 100 + ["e"]
    parts = whole_prompts(prompts)
    assert [(part.start, part.stop) for part in parts] == [(0, 60), (60, 90), (90, 190), (190, 191)]
    assert [(part.start, part.stop) for part in whole_prompts([str(i) for i in range(130)])] == [
        (0, 64),
        (64, 128),
        (128, 130),
    ]
    assert whole_prompts(["a"] * 3) == [slice(0, 3)]


def test_ocr_prompts_are_many_distinct_and_disjoint():
    train, held_out = PromptSource("ocr-words"), PromptSource("ocr-words-heldout")
    prompts = {entry["prompt"] for entry in train.entries()}
    assert len(prompts) == len(train.entries()) > 5000
    texts = {entry["text"] for entry in train.entries()}
    assert not texts & {entry["text"] for entry in held_out.entries()}
    assert all(
        entry["prompt"].count('"') == 2 and f'"{entry["text"]}"' in entry["prompt"]
        for entry in train.entries()
    )
    assert train.draw(8, 0, 3) == PromptSource("ocr-words").draw(8, 0, 3) != train.draw(8, 0, 4)
    evaluated = held_out.all()
    assert len(evaluated) == 384 and len({entry["text"] for entry in evaluated}) > 100
    assert held_out.all(10) == evaluated[:10]


@pytest.fixture
def folder(tmp_path):
    """Three pictures of two sizes, named out of order, and their prompts."""
    images = tmp_path / "images"
    images.mkdir()
    for name, red, side in (("b.png", 51, 16), ("c.png", 255, 20), ("a.png", 0, 16)):
        Image.fromarray(np.full((side, side, 3), (red, 0, 0), dtype=np.uint8)).save(images / name)
    (tmp_path / "prompts.txt").write_text("black\ndark\nred\n")
    return tmp_path


def test_score_prints_a_table_and_writes_json(inside, mine, folder):
    command = ["score", "--images", "images", "--prompts", "prompts.txt", "--json", "scores.json"]
    code, out, err = inside(*command, "--reward", "mine:scaled", "--set", "scale=10")
    assert code == 0, err
    assert "mine:scaled: mean 4.0000 of 3 pictures" in out and "a.png" in out and "dark" in out
    assert json.loads((folder / "scores.json").read_text()) == {
        "reward": "mine:scaled",
        "settings": {"scale": 10},
        "mean": pytest.approx(4.0),
        "scores": [
            {"image": "a.png", "prompt": "black", "score": 0.0},
            {"image": "b.png", "prompt": "dark", "score": 2.0},
            {"image": "c.png", "prompt": "red", "score": 10.0},
        ],
    }
    assert_refused(inside(*command, "--reward", "mine:redness"), "--json scores.json: already exists")


def test_score_refuses_in_one_line(inside, mine, folder):
    command = ["score", "--images", "images", "--prompts", "prompts.txt"]
    pytest.importorskip("rapidocr", reason="needs rapidocr and onnxruntime")
    assert_refused(inside(*command, "--reward", "ocr"), "expected a text in double quotes", "got 'black'")
    assert_refused(inside(*command, "--reward", "orc"), "did you mean 'ocr'?")
    assert_refused(
        inside(*command, "--reward", "ocr", "--set", "mod=word"),
        "unknown setting 'mod', did you mean 'mode'?",
    )
    assert_refused(inside(*command, "--reward", "ocr", "--set", "mode"), "expected KEY=VALUE, got 'mode'")
    assert_refused(
        inside(*command, "--reward", "mine:slow", "--set", "timeout=0.1"),
        "reward mine:slow: expected values within 0.1 s",
    )
    assert_refused(
        inside("score", "--images", "none", *command[3:], "--reward", "ocr"), "expected a folder of pictures"
    )
    (folder / "prompts.txt").write_text("black\ndark\n")
    assert_refused(
        inside(*command, "--reward", "mine:redness"), "expected 3 prompts, one for each picture, got 2"
    )
    (folder / "images" / "b.png").write_bytes(b"no picture")
    (folder / "prompts.txt").write_text("black\ndark\nred\n")
    assert_refused(inside(*command, "--reward", "mine:redness"), "b.png: cannot be read as a picture")


SETTINGS = ("rollout.micro_batch=3", "evaluate.every=0", "train.iterations=2")


def recipe_file(folder, rewards, name="small.yaml"):
    path = folder / name
    path.write_text(SMALL + rewards)
    return path


def train(recipe, output, overrides=SETTINGS):
    from crd_fast.train.trainer import Trainer

    trainer = Trainer(load_recipe(recipe, overrides), output)
    trainer.run()
    return metrics(output), load_file(sorted((output / "checkpoints").iterdir())[-1] / "training.safetensors")


class Afterwards:
    """Scores one call after another when asked for results: no thread, nothing at the same time."""

    def __init__(self, rewards):
        self.rewards, self.calls = rewards, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def put(self, images, metadata):
        self.calls.append((images, [entry["prompt"] for entry in metadata], metadata))

    def results(self):
        return {
            reward.name: np.concatenate([np.array(reward.score(*call)) for call in self.calls])
            for reward in self.rewards
        }


def test_results_do_not_depend_on_the_overlap(mine, tmp_path, monkeypatch):
    recipe = recipe_file(
        tmp_path, "rewards: {geneval: 1.0, 'mine:redness': 0.5}\nadvantage: {aggregate: gdpo}\n"
    )
    found, found_weights = train(recipe, tmp_path / "beside")
    calls = mine().calls
    assert {thread for thread, _ in calls} == {"reward mine:redness"}
    assert [len(prompts) for _, prompts in calls] == [4] * 4  # two iterations of two prompts by four samples
    assert all(len(set(prompts)) == 1 for _, prompts in calls)
    monkeypatch.setattr("crd_fast.rewards.registry.Scoring", Afterwards)
    expected, expected_weights = train(recipe, tmp_path / "after")
    assert found == expected
    assert all(torch.equal(found_weights[name], value) for name, value in expected_weights.items())
    record = found[-1]
    assert record["reward_mean"] == pytest.approx(
        record["reward/geneval"] + 0.5 * record["reward/mine:redness"]
    )
    assert "groups_equal" in record and "reward_std/geneval" in record


def test_a_reward_that_fails_ends_the_run_and_keeps_its_checkpoints(inside, mine, tmp_path):
    recipe = recipe_file(tmp_path, "rewards: {'mine:third_time': 1.0}\n")
    overrides = [
        item for setting in ("evaluate.every=0", "train.iterations=9") for item in ("--set", setting)
    ]
    result = inside("train", recipe, "--output", tmp_path / "run", *overrides)
    assert_refused(
        result,
        "iteration 3: reward mine:third_time: RuntimeError: no more",
        "checkpoints up to the last one are intact",
    )
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "iteration-000001",
        "iteration-000002",
    ]
    assert [record["iteration"] for record in metrics(tmp_path / "run")] == [1, 2]


def test_a_reward_that_hangs_ends_the_run(inside, mine, tmp_path):
    recipe = recipe_file(tmp_path, "rewards: {'mine:slow': {timeout: 0.2}}\n")
    result = inside("train", recipe, "--output", tmp_path / "run", "--set", "evaluate.every=0")
    assert_refused(result, "iteration 1: reward mine:slow: expected values within 0.2 s, got none")


def test_judges_are_scored_at_evaluations_and_never_trained_on(inside, mine, tmp_path):
    judged = recipe_file(
        tmp_path, "rewards: {'mine:redness': 1.0}\neval_rewards: {diversity: {}, colorfulness: 5.0}\n"
    )
    alone = recipe_file(tmp_path, "rewards: {'mine:redness': 1.0}\n", "alone.yaml")
    found, found_weights = train(judged, tmp_path / "judged", ["evaluate.samples_per_prompt=2"])
    expected, expected_weights = train(alone, tmp_path / "alone", ["evaluate.samples_per_prompt=2"])
    extra = {"eval/judge/diversity", "eval/judge/colorfulness"}
    errors = {"standard_error/reward", "standard_error/judge/diversity", "standard_error/judge/colorfulness"}
    assert [set(a) - set(b) for a, b in zip(found, expected)] == [extra | errors, set(), extra | errors]
    assert [{k: v for k, v in r.items() if k not in extra | errors} for r in found] == expected
    assert all(torch.equal(found_weights[name], value) for name, value in expected_weights.items())
    assert found[0]["eval/judge/diversity"] > 0
    refused = recipe_file(tmp_path, "eval_rewards: {ocr: 1.0}\n", "refused.yaml")
    pytest.importorskip("rapidocr", reason="needs rapidocr and onnxruntime")
    assert_refused(
        inside("train", refused, "--output", tmp_path / "refused"),
        "reward ocr: expected a text in double quotes",
    )


def test_a_reward_that_is_constant_is_warned_of_once(mine, tmp_path, caplog):
    recipe = recipe_file(tmp_path, "rewards: {'mine:Thing': {sharpness: 7.0}}\n")
    train(recipe, tmp_path / "run", ["evaluate.every=0", "train.iterations=5"])
    warning = "iteration 4: reward mine:Thing was 7 for each of the last 32 images: it may be broken"
    assert (tmp_path / "run" / "warnings.txt").read_text() == f"{warning}\n"
    assert [r.getMessage() for r in caplog.records if r.name == "crd_fast"] == [f"warning: {warning}"]
