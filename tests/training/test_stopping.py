"""Signals in the middle of a run: what is left is whole, and goes on as if nothing had been."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest
import torch

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.run.metrics import read_metrics
from crd_fast.run.observer import Observer
from crd_fast.train.stopping import Stopping
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint

pytestmark = pytest.mark.usefixtures("all_shallow")

SETTINGS = [
    "rollout.prompts_per_iteration=4",
    "rollout.samples_per_prompt=2",
    "rollout.steps=2",
    "rollout.micro_batch=2",
    "train.timesteps=1",
    "train.micro_batch=2",
    "train.steps_per_iteration=2",
    "train.iterations=3",
    "evaluate.every=2",
    "evaluate.steps=1",
    "evaluate.max_prompts=6",
    "evaluate.guided_base=false",
]


class Signals(Observer):
    """Sends signals to this process when a phase of the second iteration is `after` samples further."""

    def __init__(self, phase, after, *numbers):
        self.wanted, self.after, self.numbers = phase, after, numbers
        self.iterations = self.count = 0
        self.inside = []

    @contextmanager
    def phase(self, name, total=None):
        self.iterations += name == "iteration"
        self.inside.append(name)
        if name == self.wanted == "rewards" and self.iterations == 2:
            self.send()
        yield
        self.inside.pop()

    def advance(self, count):
        if self.inside[-1] == self.wanted and self.iterations == 2:
            self.count += count
            if self.count >= self.after:
                self.send()

    def send(self):
        for number in self.numbers:
            os.kill(os.getpid(), number)
        self.numbers = ()


@pytest.fixture(autouse=True)
def nothing_ignored():
    """Whether or not these tests were begun by nohup or by a script's `&`."""
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, hang_up)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("stopping") / "whole"
    trainer = Trainer(load_recipe("builtin", SETTINGS), run)
    assert trainer.run()
    return [parameter.detach().clone() for parameter in trainer.weights.trained()], records(run)


def records(run):
    timed = ("seconds", "peak", "images_per_second", "tflops")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in read_metrics(run)]


def goes_on_as_if_nothing_had_been(run, whole):
    again = Trainer(load_recipe("builtin", SETTINGS), run, resume=True)
    assert again.run()
    weights, expected = whole
    for mine, other in zip(again.weights.trained(), weights, strict=True):
        assert torch.equal(mine, other)
    assert records(run) == expected


@pytest.mark.parametrize(
    "phase, after, numbers, iteration",
    [
        ("rollout", 2, [signal.SIGTERM], 1),
        ("rollout", 2, [signal.SIGHUP], 1),
        ("rollout", 2, [signal.SIGINT], 2),  # the first Ctrl-C lets the iteration end
        ("rollout", 2, [signal.SIGINT, signal.SIGINT], 1),
        ("rewards", 0, [signal.SIGTERM], 1),
        ("update", 2, [signal.SIGTERM], 1),
        ("update", 6, [signal.SIGTERM], 2),  # after the first of two steps
        ("evaluation", 2, [signal.SIGTERM], 2),
    ],
)
def test_what_is_left_is_whole_and_goes_on(whole, tmp_path, phase, after, numbers, iteration):
    run = tmp_path / "run"
    trainer = Trainer(load_recipe("builtin", SETTINGS), run, observer=Signals(phase, after, *numbers))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert trainer.run() is False
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    newest = checkpoint.newest(run / "checkpoints")
    assert newest.name == f"iteration-{iteration:06d}"
    assert [record["iteration"] for record in records(run)] == list(range(iteration + 1))

    goes_on_as_if_nothing_had_been(run, whole)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_a_run_was_begun_to_ignore_does_nothing(tmp_path, number):
    """As nohup begins one, for its terminal's end, and a script's `&`, for a Ctrl-C that ends the script."""
    signal.signal(number, signal.SIG_IGN)
    settings = [*SETTINGS, "evaluate.every=0", "train.iterations=2"]
    sent = Signals("rollout", 2, number, number)
    assert Trainer(load_recipe("builtin", settings), tmp_path, observer=sent).run()


def hangs_in_the_evaluation(images, prompts, metadata):
    if len(set(prompts)) > 1:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
    return [float(image.mean()) / 255 for image in images]


def test_an_evaluation_that_waits_for_a_reward_is_stopped_at_once(tmp_path):
    settings = [*SETTINGS, "train.iterations=1"]
    rewards = {hangs_in_the_evaluation: {"timeout": 60}}
    assert Trainer(load_recipe("builtin", settings), tmp_path, rewards=rewards).run() is False
    assert checkpoint.newest(tmp_path / "checkpoints").name == "iteration-000000"


@pytest.mark.parametrize("phase, iteration", [("rewards", 1), ("evaluation", 2)])
def test_what_fails_after_ctrl_c_as_a_child_does_that_gets_it_too_is_a_stop(
    whole, tmp_path, caplog, phase, iteration
):
    """A compiler, or a program that a reward calls, is in the process group of the terminal."""

    class Fails(Signals):
        def send(self):
            super().send()
            raise RuntimeError("the child died")

    settings = [*SETTINGS, f"train.iterations={iteration + (phase == 'rewards')}"]
    run = tmp_path / "run"
    observer = Fails(phase, 2, signal.SIGINT)
    assert Trainer(load_recipe("builtin", settings), run, observer=observer).run() is False
    assert "it stops before the iteration ends: the child died" in caplog.text
    assert checkpoint.newest(run / "checkpoints").name == f"iteration-{iteration:06d}"
    goes_on_as_if_nothing_had_been(run, whole)


def fails_in_the_third_iteration(images, prompts, metadata):
    fails_in_the_third_iteration.calls += 1
    if fails_in_the_third_iteration.calls > 1 + 2 * 4:  # tried out, then a call for each prompt
        raise RuntimeError("no more")
    return [float(image.mean()) / 255 for image in images]


REWARDS = {fails_in_the_third_iteration: 1.0}


def test_a_reward_that_fails_costs_no_finished_iteration(tmp_path, caplog):
    settings = [*SETTINGS, "evaluate.every=0"]
    fails_in_the_third_iteration.calls = 0
    trainer = Trainer(load_recipe("builtin", settings), tmp_path, rewards=REWARDS)
    with pytest.raises(UserError, match="no more"):
        trainer.run()
    assert checkpoint.newest(tmp_path / "checkpoints").name == "iteration-000002"
    assert "saved iteration 2: crd-fast train --resume" in caplog.text
    fails_in_the_third_iteration.calls = 2 * 4
    again = Trainer(load_recipe("builtin", settings), tmp_path, resume=True, rewards=REWARDS)
    with pytest.raises(UserError):  # nothing new to save
        again.run()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_run_is_not_finished_before_its_last_evaluation_is(tmp_path):
    settings = [*SETTINGS, "train.iterations=2"]
    observer = Signals("evaluation", 2, signal.SIGTERM)
    assert Trainer(load_recipe("builtin", settings), tmp_path, observer=observer).run() is False
    assert "eval/reward_mean" not in read_metrics(tmp_path)[-1]
    assert Trainer(load_recipe("builtin", settings), tmp_path, resume=True).run()
    assert "eval/reward_mean" in read_metrics(tmp_path)[-1]


@pytest.mark.parametrize("alone", [True, False])
def test_a_second_ctrl_c_is_offered_where_it_does_something(alone, caplog):
    stopping = Stopping(alone)
    with stopping.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.requested
    assert "finishing this iteration" in caplog.text
    assert ("Ctrl-C again" in caplog.text) == alone


@pytest.mark.parametrize("says", [True, False])
def test_of_several_processes_one_says_that_the_iteration_ends_first(says, caplog):
    stopping = Stopping(alone=False, say=says)
    with stopping.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.requested
    assert ("finishing this iteration" in caplog.text) == says
