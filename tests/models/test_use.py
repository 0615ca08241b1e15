"""eval and sample of models that were not trained here, through the real command line."""

import json

import pytest
from PIL import Image

from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from tests.models.test_init_lora import written

REWARD = "tests.models.conftest:brightness"


@pytest.fixture
def asked(prompts_file):
    """What is asked of a mere pipeline."""
    return [
        *("--prompts", prompts_file, "--reward", REWARD, "--samples", 2, "--steps", 2, "--size", 64),
        *("--guidance-scale", 3),
    ]


def values(path, number=0):
    found = json.loads(path.read_text())["sources"][number]["metrics"]
    return {name: each["value"] for name, each in found.items()}


def test_a_pipeline_with_a_checkpoints_lora_is_the_checkpoint(inside, tiny, recipe, tmp_path, asked):
    assert Trainer(recipe(tiny("sd3"), "train.learning_rate=0.1"), tmp_path / "run").run()
    (file,) = (checkpoint.find(tmp_path / "run", "newest") / "diffusers").glob("*.safetensors")
    for name, *arguments in [
        ("run", tmp_path / "run"),
        ("lora", tiny("sd3"), "--lora", file),
        ("folder", tiny("sd3"), "--lora", file.parent),
        ("base", tiny("sd3")),
        ("seed", tiny("sd3"), "--seed", 1),
    ]:
        code, out, err = inside("eval", *arguments, *asked, "--json", tmp_path / f"{name}.json")
        assert code == 0, err
        assert "guidance scale 3" in " ".join(out.split())
    found = {name: values(tmp_path / f"{name}.json") for name in ("run", "lora", "folder", "base", "seed")}
    assert found["run"] == found["lora"] == found["folder"] != found["base"]
    assert found["base"] != found["seed"]

    both = tmp_path / "both.json"
    code, out, err = inside("eval", tiny("sd3"), tmp_path / "run", *asked, "--json", both)
    assert code == 0, err
    assert values(both) == found["base"] and values(both, 1) == found["run"]
    difference = json.loads(both.read_text())["differences"]["reward_mean"]
    wanted = found["run"]["reward_mean"] - found["base"]["reward_mean"]
    assert difference["difference"] == pytest.approx(wanted, rel=1e-12)
    (line,) = [line for line in out.splitlines() if "reward_mean" in line]
    shown = f"{wanted:+.3f} ± {difference['error']:.3f}{'*' if difference['p'] < 0.05 else ' '}"
    assert shown in line


def test_guidance_for_each_of_two(inside, tiny, tmp_path, asked):
    arguments = [*asked, "--guidance-scale", 1, "--json", tmp_path / "two.json"]
    code, _, err = inside("eval", tiny("sd3"), tiny("sd3"), *arguments)
    assert code == 0, err
    first, second = json.loads((tmp_path / "two.json").read_text())["sources"]
    assert (first["guidance_scale"], second["guidance_scale"]) == (3, 1)
    assert first["metrics"] != second["metrics"]


def test_sample_of_a_pipeline(inside, tiny, recipe, tmp_path, prompts_file):
    lora = written(tiny("sd3"), recipe, tmp_path / "lora")
    drawn = []
    for number, more in enumerate(((), ("--lora", lora), ("--seed", 1), ("--guidance-scale", 3))):
        out, scores = tmp_path / f"{number}.png", tmp_path / f"{number}.json"
        options = ["--prompts", prompts_file, "--samples", 1, "--steps", 1, "--size", 64, "--reward", REWARD]
        code, printed, err = inside("sample", tiny("sd3"), *options, "--out", out, "--json", scores, *more)
        assert code == 0, err
        rows = json.loads(scores.read_text())["drawn"]
        assert [row["prompt"] for row in rows] == prompts_file.read_text().splitlines()
        assert f"{rows[0]['scores'][REWARD]:.4f}" in printed
        drawn.append(out.read_bytes())
    assert len(set(drawn)) == len(drawn)


def test_pictures_of_a_pipeline_that_draws_none_as_large_as_the_default(inside, tiny, tmp_path):
    options = ("--prompt", "a cat", "--samples", 1, "--steps", 1, "--out", tmp_path / "a.png")
    code, _, err = inside("sample", tiny("sd3"), *options)
    assert code == 0, err
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size == (256, 256)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("PIPELINE",), "--reward and --prompts: expected for"),
        (("PIPELINE", "builtin", "builtin"), "expected one SOURCE or two"),
        (("PIPELINE", "--guidance-scale", 1, "--guidance-scale", 2), "expected one, or one for each"),
        (
            ("PIPELINE", "--lora", "nowhere", "--reward", "colorfulness", "--prompts", "FILE"),
            "nowhere: no such",
        ),
        (("no-model",), "no such folder"),
        (("LORA",), "weights alone; expected the model that they go with: MODEL --lora "),
    ],
)
def test_what_cannot_be_evaluated(inside, tiny, prompts_file, tmp_path, arguments, message):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    places = {"PIPELINE": tiny("sd3"), "FILE": prompts_file, "LORA": tmp_path}
    code, _, err = inside("eval", *(places.get(argument, argument) for argument in arguments))
    assert code == 2 and message in err, err
