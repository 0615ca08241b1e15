"""Rewards by name, with settings, in a recipe."""

import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.prompts.source import PromptSource
from crd_fast.rewards import REWARDS, Rewards, load, registry
from crd_fast.rewards.registry import whole_prompts
from tests.cli.conftest import metrics
from tests.rewards.conftest import recipe_file


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
    assert rewards.combined(values, entries(2)).tolist() == [7.0, 27.5]
    assert rewards.report(pictures(0, 255), entries(2), values)[0]["reward_mean"] == 17.25


def brightness(images, prompts, metadata):
    return [float(image.max()) / 255 for image in images]


class Meddler:
    """Writes wherever it is let."""

    def check(self, metadata):
        for entry in metadata:
            entry["prompt"] = "checked"

    def score(self, images, prompts, metadata):
        self.check(metadata)
        return [0.0] * len(images)

    def report(self, images, prompts, metadata):
        self.check(metadata)
        return {"brightest": float(images.max())}


class Painter(Meddler):
    def report(self, images, prompts, metadata):
        images[:] = 0
        return {}


def test_check_and_report_get_copies_as_well():
    images, metadata = pictures(0, 255), entries(2)
    rewards = Rewards({Meddler: 1.0})
    rewards.check(metadata)
    values = rewards.score(images, metadata)
    assert rewards.report(images, metadata, values)[0]["brightest"] == 255
    assert metadata == entries(2)
    with pytest.raises(UserError, match="Painter: writes to its images, which are read-only"):
        Rewards({Painter: 1.0}).report(images, metadata, {f"{__name__}:Painter": np.zeros(2)})
    assert images.max() == 255


class Detailed:
    """Reports of pictures one by one what it is told to."""

    def __init__(self, count=2, per_image=None, of_all="redness", value=0.5):
        self.of_all, self.value = of_all, value
        self.reported = {"reds": [1.0] * count} if per_image is None else per_image

    def score(self, images, prompts, metadata):
        return [0.0] * len(images)

    def report(self, images, prompts, metadata):
        return {self.of_all: self.value, "per_image": self.reported}


def test_what_is_reported_of_single_pictures():
    name = f"{__name__}:Detailed"
    images, metadata, values = pictures(0, 255), entries(2), {name: np.zeros(2)}
    found, per_image = Rewards({Detailed: 1.0}).report(images, metadata, values)
    assert found["redness"] == 0.5 and "per_image" not in found
    assert per_image.keys() == {"reward", "reds"} and per_image["reds"].tolist() == [1, 1]
    for wrong, words in [
        ({"count": 3}, f"reward {name}: reds: expected 2 values, got 3"),
        ({"per_image": {"reds": [1.0, float("nan")]}}, "reds: expected finite numbers, got nan for image 1"),
        ({"per_image": 7}, "'int' object is not iterable"),
        ({"of_all": "reward_mean"}, "its report names reward_mean, which evaluations have themselves"),
        ({"per_image": {"reward": [1.0, 1.0]}}, "its report names reward, which evaluations have themselves"),
        ({"of_all": "drift/guided"}, "its report names drift/guided, which evaluations have themselves"),
        (
            {"per_image": {"judge/a": [1.0, 1.0]}},
            "its report names judge/a, which evaluations have themselves",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            Rewards({Detailed: wrong}).report(images, metadata, values)


class Another(Detailed):
    pass


def test_rewards_that_report_the_same_name_do_not_overwrite_each_other():
    images, metadata = pictures(0, 255), entries(2)
    first, second = f"{__name__}:Detailed", f"{__name__}:Another"

    def report(**settings):
        rewards = Rewards({Detailed: 1.0, Another: settings})
        return rewards.report(images, metadata, {first: np.zeros(2), second: np.ones(2)})

    found, per_image = report()  # they agree, as GenEval's do
    assert found["redness"] == 0.5 and per_image["reds"].tolist() == [1, 1]
    for settings, words in [
        ({"value": 0.25}, f"reward {second}: its report names redness, to which {first} gives another value"),
        ({"per_image": {"reds": [1.0, 0.0]}}, f"names reds, to which {first} gives another value"),
        (
            {"of_all": f"reward/{first}"},
            f"reward {second}: its report names reward/{first}, which evaluations",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            report(**settings)
    with pytest.raises(
        UserError, match=f"reward {first}: its report names reward/{second}, which evaluations"
    ):
        rewards = Rewards({Detailed: {"of_all": f"reward/{second}"}, Another: 1.0})
        rewards.report(images, metadata, {first: np.zeros(2), second: np.ones(2)})


@pytest.mark.parametrize(
    "value, reported",
    [
        *((np.float32(0.5), 0.5), (np.array(2), 2.0), (torch.tensor(0.25), 0.25), (True, 1.0), (3, 3.0)),
        *((None, None), (math.nan, None), (np.float16("inf"), None)),
    ],
)
def test_reported_numbers_are_plain_ones(value, reported):
    """As metrics.jsonl holds them; what is not known is not there."""
    images, metadata, values = pictures(0, 255), entries(2), {f"{__name__}:Detailed": np.zeros(2)}
    found, _ = Rewards({Detailed: {"value": value}}).report(images, metadata, values)
    assert found.get("redness") == reported and type(found.get("redness")) in (float, type(None))


@pytest.mark.parametrize("value", ["0.5", np.zeros(2), torch.zeros(2), [0.5], {"of_reds": 0.5}])
def test_a_report_of_no_number_is_refused(value):
    name = f"{__name__}:Detailed"
    with pytest.raises(UserError, match=f"reward {name}: redness of its report: expected a number, got "):
        Rewards({Detailed: {"value": value}}).report(pictures(0, 255), entries(2), {name: np.zeros(2)})


class Graded:
    """What it computes with a network of its own would keep a graph."""

    def score(self, images, prompts, metadata):
        return [torch.is_grad_enabled()] * len(images)

    def report(self, images, prompts, metadata):
        each = (torch.is_grad_enabled() for _ in images)
        return {"graded": torch.is_grad_enabled(), "per_image": {"each": list(each)}}


@pytest.mark.parametrize("settings", [{}, {"workers": 1}])
def test_nothing_is_asked_of_a_reward_with_gradients(settings):
    rewards = Rewards({Graded: settings})
    values = rewards.score(pictures(0, 255), entries(2))
    found, per_image = rewards.report(pictures(0, 255), entries(2), values)
    rewards.close()
    assert found["reward_mean"] == found["graded"] == 0 and per_image["each"].tolist() == [0, 0]


def test_a_report_that_fails_late_is_one_line():
    class Late(Constant):
        def report(self, images, prompts, metadata):
            return {"per_image": {"each": (image / 0 for image in prompts)}}

    with pytest.raises(UserError, match="reward Late: TypeError: unsupported operand"):
        Rewards({Late(1.0): 1.0}).report(pictures(0, 255), entries(2), {"Late": np.zeros(2)})


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
    assert reward.timeout == 5.0 and engine == {"timeout": math.inf}


@pytest.mark.parametrize("workers", [{}, {"workers": 1}])
def test_a_timeout_of_the_reward_s_own_is_all_there_is(mine, workers, monkeypatch):
    """A client's, of one answer: its tries may last longer than any call of the engine."""
    monkeypatch.setattr(registry, "TIMEOUT", 0.1)
    monkeypatch.setattr(registry, "Reward", functools.partial(registry.Reward, timeout=0.1))
    rewards = Rewards({"mine:Patient": {"timeout": 0.5, **workers}}, device="cpu")
    assert rewards.score(pictures(0), entries(1))["mine:Patient"].tolist() == [0.5]
    rewards.close()


def test_an_address_is_the_reward_that_is_served_there():
    reward, engine = load("http://127.0.0.1:8701", {"timeout": 5.0})
    assert type(reward).__name__ == "HttpReward" and engine == {"timeout": math.inf}
    assert (reward.client.url, reward.client.timeout) == ("http://127.0.0.1:8701", 5.0)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("genevil", {}, "unknown reward 'genevil', did you mean 'geneval'?"),
        ("my_reward.py", {}, "or file.py:name, module:name)"),
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
    evaluated = held_out.all()
    assert len(evaluated) == 384 and len({entry["text"] for entry in evaluated}) > 100
    assert held_out.all(10) == evaluated[:10]


class Travelling:
    """A reward with a network, as far as the engine knows."""

    def __init__(self):
        self.places = []

    def setup(self, device):
        self.places.append(("setup", device))

    def to(self, device):
        self.places.append(("to", device))

    def score(self, images, prompts, metadata):
        self.places.append("score")
        return [1.0] * len(images)


def test_judges_are_on_the_device_only_while_they_score():
    judge, reward = Travelling(), Travelling()
    images, entries = np.zeros((2, 4, 4, 3), np.uint8), [{"prompt": "a"}] * 2
    judges = Rewards({judge: 1.0}, device="the device", waits_on_host=True)
    judges.score(images, entries)
    assert judge.places == [("setup", "cpu"), ("to", "the device"), "score", ("to", "cpu")]
    Rewards({reward: 1.0}, device="the device").score(images, entries)
    assert reward.places == [("setup", "the device"), "score"]
