"""Bad input: one line on standard error, exit code 2, nothing lost."""

import os
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from crd_fast.commands.terminal import parse_settings
from crd_fast.errors import UserError
from tests.cli.conftest import SMALL, assert_refused

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs


ALIKE = ("--set", "rewards={colorfulness: 1}")  # a reward that asks nothing of prompts


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.learning_rat=1", "did you mean 'learning_rate'"),
        ("train.iterations=many", "train.iterations: expected"),
        ("loss.kl_min=0.5", "expected at most kl_beta (0.1), got 0.5"),
        ("rollout.samples_per_prompt=1", "greater than or equal to 2, got 1"),
        ("rewards.genevil=1", "unknown reward 'genevil', did you mean 'geneval'"),
        ("rewards.nothing:here=1", "'nothing:here' cannot be imported"),
        ("rewards.tests.models.conftest:brightnes=1", "did you mean 'brightness'?"),
        ("model.lora_targets=[nothing]", "'nothing' matches no linear layer"),
    ],
)
def test_recipe_mistakes(run, small, tmp_path, override, words):
    assert_refused(run("train", small, "--output", tmp_path / "run", "--set", override), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["rollout.prompts", "evaluate.prompts"])
def test_a_word_that_a_builtin_model_does_not_know(run, small, tmp_path, key):
    """Whichever iteration would have drawn the prompt: the run is refused before it begins."""
    prompts = tmp_path / "mine.txt"
    known = "a photo of a red circle\n"
    prompts.write_text(3 * known + "\na photo of a red dog\n" + 40 * known)
    result = run("train", small, "--output", tmp_path / "run", "--set", f"{key}={prompts}", *ALIKE)
    assert_refused(result, f"{prompts} line 5: the built-in model does not know the word 'dog'")
    assert not (tmp_path / "run").exists()


def test_a_negative_prompt_that_a_builtin_model_does_not_know(run, small, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "a photo of a red circle", "negative_prompt": "blurry"}\n')
    result = run("train", small, "--output", tmp_path / "run", "--set", f"rollout.prompts={prompts}", *ALIKE)
    assert_refused(result, f"{prompts} line 1: the built-in model does not know the word 'blurry'")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("tran",), "No such command 'tran'. Did you mean 'train'? (crd-fast --help)"),
        (("train", "--ouput", "x"), "No such option: --ouput"),
        (("train", "--seed", "many"), "Invalid value for '--seed': "),
        (("export", "x", "--to", "ckpt", "--out", "x"), "Invalid value for '--to': 'ckpt' is not one of "),
        (("export", "x", "--out", "x"), "Missing option '--to'. Choose from: diffusers, comfyui, fused, hub"),
        (("eval",), "Missing argument 'SOURCE' (crd-fast eval --help)"),
        (("eval", "builtin-orc"), "no such folder, did you mean 'builtin-ocr'?"),
        (("eval", "builtin", "--size", "0"), "--size: expected sides of at least 8 pixels, got 0"),
        (("plan", "--gpu", "9" * 400 + "GB"), "expected a size like 24GB"),
        (
            ("sample", "builtin", "--prompt", "a", "--guidance-scale", "1e300"),
            "evaluate.guidance_scale: expected at most 3.4e+38, got 1e+300",
        ),
        (("eval", "builtin", "--model", "x"), "--model x: expected with a run or its checkpoint"),
        (("sample", "builtin", "--prompt", "a", "--model", "x"), "--model x: expected with a run"),
        (("sample", "x", "--prompt"), "Option '--prompt' requires an argument (crd-fast"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where this test imports it first
def test_slips_of_the_pen(run, arguments, words):
    """One line, as for whatever else is refused, and no box."""
    assert_refused(run(*arguments), words)


def test_help_is_no_error(inside):
    for arguments in (("--help",), ("train", "-h"), ()):
        code, out, err = inside(*arguments)
        assert "Usage: crd-fast" in out and err == ""
        assert code == (0 if arguments else 2)


def test_a_plan_says_what_training_will_refuse(inside, small, tmp_path):
    """It needs no prompts itself, but is asked for before a run."""
    code, out, err = inside("plan", small)
    assert code == 0 and err == ""
    code, again, err = inside("plan", small, "--set", f"rollout.prompts={tmp_path / 'nowhere.txt'}")
    assert code == 0 and again == out and len(err.splitlines()) == 1
    assert "training will be refused" in err and "nowhere.txt: no such file" in err


OWN = ("rollout.prompts=geneval", "rewards={colorfulness: 1}", "evaluate.prompts=geneval-heldout")


def with_settings(*settings):
    return [argument for setting in settings for argument in ("--set", setting)]


def test_a_model_that_is_none(run, small, tmp_path):
    result = run("train", small, "--output", tmp_path / "run", *with_settings("model.path=somewhere", *OWN))
    assert_refused(result, "model.path: expected builtin")


@pytest.mark.parametrize(
    "own, lacks",
    [
        ((), "rewards, rollout.prompts: expected some of its own for org/name"),
        (OWN[1:], "recipe: rollout.prompts: expected"),
        ((OWN[0], OWN[2]), "rewards: expected some of its own for org/name"),
        ((*OWN[:2], "evaluate.prompts=builtin-heldout"), "evaluate.prompts: expected some of its own"),
        (("rollout.prompts={geneval: 1, builtin: 1}", *OWN[1:]), "rollout.prompts: expected some of its own"),
        ((*OWN[:2], "evaluate.prompts=builtin-ocr-heldout"), "set evaluate.prompts (or evaluate.every: 0)"),
        ((*OWN, "eval_rewards={geneval_strict: {}}"), "eval_rewards: expected some of its own"),
        (("evaluate.every=0",), "rewards, rollout.prompts: expected some of its own for org/name"),
    ],
)
def test_what_belongs_to_the_small_model_is_no_default_of_others(run, small, tmp_path, own, lacks):
    settings = with_settings("model.path=org/name", *own)
    result = run("train", small, "--output", tmp_path / "run", *settings)
    assert_refused(result, lacks.removeprefix("recipe: "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"\n\n", "expected at least one prompt"),
        ("latin.txt", b"a circle\nein K\xe4se\n", "line 2: expected UTF-8"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("none.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected an object with a `prompt`"),
        (
            "norules.jsonl",
            b'{"prompt": "a photo of a circle"}\n',
            "include: expected a list of at least one clause",
        ),
    ],
)
def test_prompt_files(run, small, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    result = run(
        "train",
        small,
        "--output",
        tmp_path / "run",
        "--set",
        f"rollout.prompts={path}",
        "--set",
        "evaluate.every=0",
    )
    assert_refused(result, words)


REWARDS = """
def short(images, prompts, metadata):
    return [1.0]

def nan(images, prompts, metadata):
    return [float("nan")] * len(images)

def words(images, prompts, metadata):
    return ["good"] * len(images)

def nothing(images, prompts, metadata):
    return None

def pair(images, prompts, metadata):
    return [1.0] * len(images), {}
"""


@pytest.mark.parametrize(
    "name, words",
    [
        ("short", "expected 4 values, got 1"),
        ("nan", "expected finite numbers, got nan"),
        ("words", "expected finite numbers, got 'good'"),
        ("nothing", "expected 4 values, got NoneType"),
        ("pair", "expected 4 values alone, got a pair of them and a dict"),
    ],
)
def test_rewards_that_misbehave(run, small, tmp_path, monkeypatch, name, words):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    small.write_text(SMALL + f"rewards: {{'my_rewards:{name}': 1.0}}\n")
    result = run("train", small, "--output", tmp_path / "run", "--set", "evaluate.every=0")
    assert_refused(result, f"reward my_rewards:{name}: {words}")


def test_an_output_folder_that_holds_a_run(run, small, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert_refused(run("train", small, "--output", tmp_path), "already holds a run")
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


@pytest.mark.parametrize(
    "name", ["report.html", "environment.json", "samples", "tensorboard", "warnings.txt", "flops.jsonl"]
)
@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_an_output_folder_with_what_a_run_would_write_over(run, small, tmp_path, name, kind):
    (tmp_path / name).write_text("mine") if kind == "file" else (tmp_path / name).symlink_to("nothing")
    before = sorted(tmp_path.iterdir())
    assert_refused(run("train", small, "--output", tmp_path), f"{name} is there already")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", ["sample", "plan", "score", "report"])
@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing", "under a file"])
def test_files_that_commands_write_are_new(run, tmp_path, option, kind):
    path = tmp_path / "there"
    {
        "file": lambda: path.write_text("mine"),
        "folder": path.mkdir,
        "link to nothing": lambda: path.symlink_to("nothing"),
        "under a file": lambda: path.write_text("mine"),
    }[kind]()
    target = path / "new" if kind == "under a file" else path
    arguments = {
        "sample": ("sample", "builtin", "--prompt", "a photo of a circle", "--out", target),
        "plan": ("plan", "--json", target),
        "report": ("report", tmp_path, "--out", target),
        "score": (
            "score",
            "--reward",
            "colorfulness",
            "--images",
            tmp_path,
            "--prompts",
            "p",
            "--json",
            target,
        ),
    }[option]
    words = "is no folder" if kind == "under a file" else "already exists"
    assert_refused(run(*arguments), words)
    assert path.is_symlink() or path.is_dir() or path.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_scores_and_pictures_are_not_one_file(run, tmp_path):
    both = ("--out", tmp_path / "grid.png", "--json", tmp_path / "." / "grid.png")
    assert_refused(
        run("sample", "builtin", "--prompt", "a photo of a circle", *both), "another file than --out"
    )


def test_sources_that_are_no_run(run, tmp_path):
    assert_refused(run("eval", tmp_path), "no checkpoint")
    assert_refused(
        run("sample", tmp_path / "no", "--prompt", "x", "--out", tmp_path / "x.png"), "no such folder"
    )
    assert_refused(run("report", tmp_path), "config.yaml")
    assert_refused(run("train", "--resume", tmp_path), "expected the folder of a run")


def test_ctrl_c_where_nothing_is_to_be_saved(inside, tmp_path):
    """In a command that asks for no signals: one line, and the exit code of shells."""
    (tmp_path / "pressed.py").write_text(
        "import signal\n\ndef score(images, prompts, metadata):\n    signal.raise_signal(signal.SIGINT)\n"
        "    return [0.0] * len(images)\n"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = inside(
            *("score", "--reward", f"{tmp_path}/pressed.py:score", "--images", tmp_path),
            *("--prompts", tmp_path / "prompts.txt", "--json", tmp_path / "scores.json"),
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out, err) == (130, "", "stopped\n")
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    "setting, words",
    [
        ("scale", "--set: expected KEY=VALUE, got 'scale'"),
        ("=1", "--set: expected KEY=VALUE, got '=1'"),
        ("scale=1:30", "--set scale=1:30: 1:30 means 90 in YAML"),
        ("scale={a: 1, a: 2}", "--set scale={a: 1, a: 2}: 'a' stands twice"),
        ("scale=[", "--set scale=[: is not YAML"),
    ],
)
def test_a_rewards_settings_are_read_as_recipes_are(setting, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_settings([setting])
    assert parse_settings(["scale=5e-1", "mode=scene", "top={k: 3}"]) == {
        "scale": 0.5,
        "mode": "scene",
        "top": {"k": 3},
    }


def test_a_pipe_that_is_read_no_further_is_no_error():
    """As of `crd-fast recipes | head`: nothing is said, and no traceback is left behind."""
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "crd_fast", "recipes"], stdout=write, stderr=subprocess.PIPE
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")
