"""Code that a loaded file names runs only where somebody agrees, and whatever it raises is one line."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from crd_fast.weights import durable
from tests.cli.conftest import SMALL, metrics
from tests.rewards.conftest import assert_refused

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs

OFF = SMALL.replace("every: 2,", "every: 0,")  # no evaluations
MODULE = '''
import os
import sys
from pathlib import Path
from subprocess import Popen

import torch

Path(__file__).with_name("imported").touch()


def brightness(images, prompts, metadata):
    return [float(image.mean()) for image in images]


def pictures_alone(images):
    return [0.0] * len(images)


def leaves(images, prompts, metadata):
    sys.exit(0)


def breaks(images, prompts, metadata):
    raise OSError(28, "No space left on device", "/some/where")


def moves(images, prompts, metadata):
    os.chdir(Path(__file__).with_name("elsewhere"))
    return [0.5] * len(images)


class NoMethod:
    pass


class Leaves:
    """Wants to end the process in the method of this name."""

    def __init__(self, method):
        self.method = method
        self.leave("init")

    def leave(self, method):
        if method == self.method:
            sys.exit(0)

    def setup(self, device):
        self.leave("setup")

    def check(self, metadata):
        self.leave("check")

    def report(self, images, prompts, metadata):
        self.leave("report")
        return {}

    def score(self, images, prompts, metadata):
        self.leave("score")
        return [float(image.mean()) for image in images]


class Changes(Leaves):
    """Changes what torch keeps for the whole process in each of its methods."""

    def __init__(self, changes):
        self.changes = changes
        self.leave("init")

    def leave(self, method):
        if self.changes:
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            torch.set_num_threads(3)
            torch.use_deterministic_algorithms(True)
            torch.set_float32_matmul_precision("medium")
            torch.backends.cudnn.benchmark = True


constant = 3
'''


PICTURES = ["--images", "pictures", "--prompts", "prompts.txt"]


def a_picture(folder):
    """What PICTURES names."""
    (folder / "prompts.txt").write_text("a\n")
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "a.png")


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module of rewards in the current folder, not imported; whether it has been since."""
    (tmp_path / "foreign.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("foreign", None)
    yield (tmp_path / "imported").exists
    sys.modules.pop("foreign", None)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of one iteration with a reward that ships."""
    from crd_fast.config import load_recipe
    from crd_fast.train.trainer import Trainer

    folder = tmp_path_factory.mktemp("ended")
    (folder / "small.yaml").write_text(OFF + "rewards: {colorfulness: 1.0}\n")
    Trainer(load_recipe(folder / "small.yaml", ["train.iterations=1"]), folder / "run").run()
    return folder / "run"


@pytest.fixture
def naming(ended, tmp_path):
    """A copy of that run whose files name other rewards."""

    def make(rewards, key="rewards"):
        run = shutil.copytree(ended, tmp_path / "run", dirs_exist_ok=True)
        config = run / "config.yaml"
        kept = [line for line in config.read_text().splitlines() if not line.startswith(f"{key}:")]
        config.write_text("\n".join([*kept, f"{key}: {json.dumps(rewards)}"]) + "\n")
        state = run / "checkpoints" / "iteration-000001" / "state.json"
        content = json.loads(state.read_text())
        content["recipe"][key] = rewards
        content["recipe"]["evaluate"] |= {"max_prompts": 2, "steps": 1}
        state.write_text(json.dumps(content))
        durable.seal(state.parent)  # whoever writes a checkpoint writes its hashes as well
        return run

    return make


@pytest.mark.parametrize("key", ["rewards", "eval_rewards"])
def test_a_run_that_names_code_needs_consent(inside, foreign, naming, key):
    run = naming({"foreign:brightness": 1.0}, key)
    refused = inside("train", "--resume", run, "--max-iterations", 2)
    again = f"--allow-code: crd-fast train --resume {run} --max-iterations 2 --allow-code"
    assert_refused(refused, "config.yaml names rewards that do not ship", "foreign:brightness", again)
    checkpoint = run / "checkpoints" / "iteration-000001"
    assert_refused(inside("eval", checkpoint), f"crd-fast eval {checkpoint} --allow-code")
    assert not foreign()
    code, _, err = inside("sample", run, "--prompt", "a red circle", "--out", "x.png", "--samples", 1)
    assert code == 0, err
    assert inside("report", run)[0] == 0 and not foreign()  # neither needs a reward

    code, out, err = inside("eval", checkpoint, "--allow-code")
    assert code == 0, err
    assert foreign() and "foreign:brightness" in out
    code, _, err = inside("train", "--resume", run, "--max-iterations", 2, "--allow-code")
    assert code == 0, err
    assert metrics(run)[-1]["iteration"] == 2


def test_what_ships_and_this_machine_need_none(inside, naming, tmp_path):
    run = naming({"http://localhost:1": {"retries": 0}})
    assert_refused(inside("eval", run), "http://localhost:1: cannot be reached")
    for rewards in ({"http://192.0.2.1:80": 1}, {"http": {"url": "http://192.0.2.1", "token_env": "HOME"}}):
        assert_refused(inside("eval", naming(rewards)), "--allow-code", next(iter(rewards)))


def test_a_recipe_that_is_given_is_ones_own_word(inside, foreign, tmp_path):
    (tmp_path / "mine.yaml").write_text(OFF + "rewards: {'foreign:brightness': 1.0}\n")
    code, _, err = inside("train", "mine.yaml", "--output", "run", "--max-iterations", 1)
    assert code == 0, err


@pytest.mark.parametrize("name", ["subprocess:Popen", "os:system", "shutil:rmtree", "builtins:exec"])
def test_pythons_own_functions_are_no_rewards(inside, naming, tmp_path, name):
    run = naming({name: {"args": ["touch", str(tmp_path / "ran")]}})
    refused = inside("eval", run, "--allow-code")
    assert_refused(refused, f"{name!r}: {name.split(':')[0]} is Python's own and has no rewards")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("foreign:Popen", "subprocess is Python's own"),
        ("foreign:constant", "expected a function or a class, got int"),
        ("foreign:pictures_alone", "expected arguments images, prompts, metadata, got (images)"),
        ("foreign:NoMethod", "expected a method score(images, prompts, metadata), found none"),
        ("nowhere.py:f", "no file nowhere.py here"),
        ("broken:f", "broken.py line 1: "),
        ("leaving:f", "reward leaving:f: wanted to end the process (SystemExit: 0)"),
        ("raising:f", "reward raising:f: KeyError: 'x'"),
    ],
)
def test_what_is_no_reward(inside, foreign, small, tmp_path, name, words):
    (tmp_path / "broken.py").write_text("def f(images, prompts, metadata) return 1\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "raising.py").write_text("{}['x']\n")
    refused = inside("train", small, "--output", tmp_path / "run", "--set", f"rewards={{'{name}': 1}}")
    assert_refused(refused, words)
    assert not (tmp_path / "run").exists()


def test_a_file_names_its_function_too(foreign, tmp_path):
    from crd_fast.rewards import load

    for name in ("foreign.py:brightness", "./foreign.py:brightness", f"{tmp_path}/foreign.py:brightness"):
        assert load(name)[0].__name__ == "brightness"


@pytest.mark.parametrize("method", ["init", "setup", "check", "report"])
def test_no_method_of_a_reward_ends_the_process(inside, foreign, small, tmp_path, method):
    small.write_text(SMALL + f"rewards: {{'foreign:Leaves': {{method: {method}}}}}\n")
    refused = inside("train", small, "--output", tmp_path / "run", "--max-iterations", 1)
    assert_refused(
        refused, "reward foreign:Leaves: wanted to end the process (SystemExit: 0)", "foreign.py line "
    )
    assert_refused(refused, f"traceback in {tmp_path / 'run' / 'error.txt'}" if method == "report" else "")


@pytest.mark.parametrize(
    "name, words", [("leaves", "SystemExit: 0"), ("breaks", "OSError: [Errno 28] No space")]
)
def test_what_a_reward_raises_is_one_line_and_a_traceback(inside, foreign, small, tmp_path, name, words):
    """In a run that is under way, so that the traceback is left in its folder."""
    (tmp_path / "later.py").write_text(
        "import foreign\ncalls = []\n\ndef reward(images, prompts, metadata):\n    calls.append(1)\n"
        f"    function = foreign.brightness if len(calls) < 5 else foreign.{name}\n"
        "    return function(images, prompts, metadata)\n"
    )
    small.write_text(OFF + "rewards: {'later:reward': 1.0}\n")
    run = tmp_path / "run"
    try:
        refused = inside("train", small, "--output", run, "--max-iterations", 9)
    finally:
        sys.modules.pop("later", None)
    assert_refused(refused, "reward later:reward: ", words, f"traceback in {run / 'error.txt'}")
    assert f"in {name}" in (run / "error.txt").read_text()


def test_what_a_library_raises_is_one_line_and_a_traceback(inside, ended, tmp_path):
    run = shutil.copytree(ended, tmp_path / "run")
    events = run / "tensorboard"
    shutil.rmtree(events)
    events.write_text("a file where TensorBoard wants its folder")
    refused = inside("train", "--resume", run, "--max-iterations", 2)
    assert_refused(refused, str(events), f"traceback in {run / 'error.txt'}")
    assert "Traceback" in (run / "error.txt").read_text()


@pytest.mark.parametrize("text", ["bad:two:", "bad[red]x[/red]", "[/]", ":smile:[bold", "a\x1b[2Jb"])
def test_text_of_the_user_is_printed_as_it_is(inside, foreign, tmp_path, text):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "0.png")
    shown = text.replace("\x1b", "\ufffd")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": text}))
    arguments = ("score", "--images", "pictures", "--prompts", "prompts.jsonl", "--reward")
    code, out, err = inside(*arguments, "foreign:brightness")
    assert code == 0, err
    assert shown in out
    name = f"no{text}"
    assert_refused(inside("train", name, "--output", "run"), f"no file or recipe called {name!r}")


def test_what_a_run_says_comes_next_can_be_typed(inside, foreign, tmp_path):
    (tmp_path / "small.yaml").write_text(OFF + "rewards: {'foreign:brightness': 1.0}\n")
    changes = ("train.iterations=1", "evaluate.max_prompts=2", "evaluate.steps=1")
    options = [word for change in changes for word in ("--set", change)]
    code, out, err = inside("train", "small.yaml", "--output", "run", *options)
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("next: "))
    command = shlex.split(line.rpartition(", ")[2])
    assert command[:2] == ["crd-fast", "eval"]
    code, _, err = inside(*command[1:])
    assert code == 0, err


def test_a_reward_that_changes_the_working_directory_moves_no_file(inside, foreign, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moves.yaml").write_text(SMALL + "rewards: {'foreign:moves': 1.0}\n")
    code, out, err = inside("train", "moves.yaml", "--output", "run", "--max-iterations", 1)
    assert code == 0, err
    assert "weights: run/checkpoints/iteration-000001" in out and "crd-fast sample run " in out
    assert (tmp_path / "run" / "report.html").exists()
    assert [record["iteration"] for record in metrics(tmp_path / "run")] == [0, 1]
    a_picture(tmp_path)
    given = {"eval": ["run", "--allow-code"], "score": ["--reward", "foreign:moves", *PICTURES]}
    for command, arguments in given.items():
        monkeypatch.chdir(tmp_path)
        code, _, err = inside(command, *arguments, "--json", f"{command}.json")
        assert code == 0, err
        assert (tmp_path / f"{command}.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.fixture
def torch_state():
    """Of this process, as it is now; and put back."""

    def now():
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
        )

    grad, dtype, device, threads, deterministic, precision, benchmark = now()
    yield now
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark


def test_what_a_reward_changes_of_torch_is_put_back(inside, foreign, small, torch_state):
    before, found = torch_state(), []
    for changes in (False, True):
        small.write_text(SMALL + f"rewards: {{'foreign:Changes': {{changes: {str(changes).lower()}}}}}\n")
        code, _, err = inside("train", small, "--output", f"{changes}", "--max-iterations", 1)
        assert code == 0, err
        found.append(metrics(Path(f"{changes}")))
    assert found[0] == found[1]
    assert torch_state() == before


POOLED = """
import threading
from concurrent.futures import ThreadPoolExecutor

pool = ThreadPoolExecutor(1)


def pooled(images, prompts, metadata):
    return list(pool.map(lambda image: threading.Event().wait(), images))
"""


def test_a_reward_that_hangs_in_a_pool_of_its_own_does_not_keep_the_command(process, tmp_path, monkeypatch):
    """Python waits for such threads when a process ends."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pooled.py").write_text(POOLED)
    a_picture(tmp_path)
    result = process("score", *PICTURES, "--set", "timeout=0.2", "--reward", "pooled.py:pooled")
    assert_refused(result, "error: reward pooled.py:pooled: expected values within 0.2 s, got none")
