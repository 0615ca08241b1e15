"""Two processes train as one does at the same global batch."""

import datetime
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crd_fast import ranks
from crd_fast.commands.boundary import leaving_traceback
from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.ranks import check_ranks, own_prompts
from crd_fast.run.metrics import MEASURED
from crd_fast.train.update import Updater
from tests.forked import main_of, two_ranks

SETTINGS = ("--set", "rollout.prompts_per_iteration=4", "--set", "train.steps_per_iteration=2")
SETTINGS += ("--set", "evaluate.drift=4.5", "--set", "evaluate.features=random")


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_are_one(inside, torchrun, small, tmp_path, streaming):
    """Without streaming torchrun starts them."""
    code, _, errors = inside("train", small, *SETTINGS, "--output", tmp_path / "one")
    assert code == 0, errors
    settings = (*SETTINGS, "--set", f"model.streaming={streaming}", "--set", "train.checkpointing=true")
    arguments = ("train", small, *settings, "--output", tmp_path / "two")
    if streaming == "true":
        runs = two_ranks(tmp_path / "ranks", main_of, arguments)
    else:
        runs = [torchrun(*arguments)]
    for run in runs:
        assert run.returncode == 0, run.stderr[-3000:]
    assert sum(run.stdout.count("report:") for run in runs) == 1

    pairs = list(zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True))
    assert [one["iteration"] for one, _ in pairs] == [0, 1, 2]
    for one, two in pairs:
        assert one.keys() == two.keys()
        for name in one:
            if not name.startswith(MEASURED):
                assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-7), name

    weights = [
        load_file(next((tmp_path / name / "checkpoints").glob("*002/training.safetensors")))
        for name in ("one", "two")
    ]
    names = [name for name in weights[0] if name.startswith("weights/policy") and "lora_B" in name]
    one, two = (torch.cat([tensors[name].flatten() for name in names]) for tensors in weights)
    assert one.norm() > 0  # lora_B starts at zero
    assert (two - one).norm() < 1e-3 * one.norm()


def late(patience):
    ranks.PATIENCE = datetime.timedelta(seconds=patience)
    own = ranks.Ranks()
    with own.main_first():
        time.sleep(4 if own.main else 0)


@pytest.mark.slow
def test_the_others_wait_while_the_first_encodes(tmp_path):
    """For as long as PATIENCE says, not for what the backend has as its own."""
    assert ranks.PATIENCE.total_seconds() >= 3600
    for patience, patient in ((60, True), (1, False)):
        first, second = two_ranks(tmp_path / str(patience), late, patience)
        assert (second.returncode == 0) == patient, second.stderr[-2000:]
        assert first.returncode == 0 or not patient, first.stderr[-2000:]


def fails_on_the_second(folder):
    own = ranks.Ranks()
    with leaving_traceback(folder):
        if not own.main:
            raise ZeroDivisionError("a reward's own")
        own.wait()  # for one that is gone


@pytest.mark.slow
def test_each_process_leaves_its_own_traceback(tmp_path):
    """What the first says is that the other is gone; what ended both is in that of the second."""
    runs = two_ranks(tmp_path / "ranks", fails_on_the_second, tmp_path)
    for run, name in zip(runs, ("error.txt", "error-rank-1.txt")):
        assert run.returncode != 0
        assert f"traceback in {tmp_path / name}" in run.stderr
    last = runs[0].stderr.splitlines()[-1]
    assert "another process has ended; its own line says why" in last and "by peer" not in last
    found = [path.name for path in tmp_path.glob("error*") if "a reward's own" in path.read_text()]
    assert found == ["error-rank-1.txt"]


def is_killed_on_the_second(folder):
    own = ranks.Ranks()
    with leaving_traceback(folder):
        if not own.main:
            os.kill(os.getpid(), signal.SIGKILL)
        own.wait()


@pytest.mark.slow
def test_what_is_said_fits_where_the_other_was_killed(tmp_path):
    """It leaves no line and no traceback."""
    first, second = two_ranks(tmp_path / "ranks", is_killed_on_the_second, tmp_path)
    assert second.returncode == -signal.SIGKILL and not second.stderr
    assert "where there is neither it was killed, as the system does" in first.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.glob("error*")] == ["error.txt"]


def has_gradients_of_nan_on_the_second(arguments):
    accumulate = Updater.accumulate

    def broken(updater, *given):
        metrics = accumulate(updater, *given)
        for parameter in updater.model.transformer.parameters() if os.environ["RANK"] == "1" else ():
            if parameter.grad is not None:
                getattr(parameter.grad, "to_local", lambda own=parameter.grad: own)().fill_(float("nan"))
        return metrics

    Updater.accumulate = broken
    main_of(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("model", [[], ["model.method=full", "model.sharding=fsdp"]])
def test_gradients_of_one_that_are_not_finite_end_all_in_one_line(small, tmp_path, model):
    """Every process knows of the same steps that they are left out, and the first one says so."""
    settings = ["rollout.prompts_per_iteration=4", "train.steps_per_iteration=2", "train.iterations=9"]
    settings += ["evaluate.every=0", *model]
    options = [item for setting in settings for item in ("--set", setting)]
    arguments = ("train", small, *options, "--output", tmp_path / "run")
    first, second = two_ranks(tmp_path / "ranks", has_gradients_of_nan_on_the_second, arguments)
    assert (first.returncode, second.returncode) == (2, 2)
    lines = first.stderr.splitlines()
    assert len(lines) == 5
    assert all(f"{i} in a row (5 end the run)" in line for i, line in enumerate(lines[:4], 1))
    assert "iteration 3: grad_norm: expected a finite number, got nan, in 5 optimizer steps" in lines[-1]
    assert second.stderr == ""
    assert [path.name for path in (tmp_path / "run").glob("error*")] == ["error.txt"]


def test_every_prompt_has_one_owner():
    shares = np.array_split(np.arange(8), 2)
    owners = [own_prompts(shares, rank, 2).tolist() for rank in range(2)]
    assert owners == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert own_prompts(shares, 0, 1).tolist() == list(range(8))


def test_prompts_that_cannot_be_dealt_out_are_refused():
    recipe = load_recipe("builtin", ["rollout.prompts_per_iteration=6", "train.steps_per_iteration=2"])
    check_ranks(recipe, 1)
    with pytest.raises(UserError, match=r"rollout.prompts_per_iteration: expected a multiple of 4 .* got 6"):
        check_ranks(recipe, 2)
