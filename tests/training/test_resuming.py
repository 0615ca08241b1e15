"""What a run goes on from, and what it refuses to: through the trainer and in processes that are killed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from crd_fast.commands.evaluate import base_scores
from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.prompts.lists import training_prompts
from crd_fast.prompts.source import PromptSource
from crd_fast.run.lock import LOCK, RunLock
from crd_fast.run.metrics import EVALUATED_ALIKE, TRAINED_ALIKE, read_metrics
from crd_fast.train.changes import check_changes
from crd_fast.train.checkpoints import evaluated_alike, lists_of
from crd_fast.train.inference import Source
from crd_fast.train.steps import IN_A_ROW
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint, durable
from tests.training.short_runs import recipe, records, saved


def test_several_lists_of_prompts_are_gone_on_with(tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(map(json.dumps, PromptSource("builtin-heldout").entries()[:5])))
    settings = [f"rollout.prompts={{builtin: 2, {mine}: 1}}", "rollout.prompts_per_iteration=3"]
    settings += ["evaluate.every=0", "checkpoint.every=1"]
    assert Trainer(recipe(*settings), tmp_path / "whole").run()
    for count in (1, 3):
        resumed = Trainer(recipe(*settings, f"train.iterations={count}"), tmp_path / "run", resume=count > 1)
        assert resumed.run()
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    drawn = [entry["prompt"] for iteration in range(3) for entry in resumed.prompts.drawn(iteration)]
    assert sum(prompt in mine.read_text() for prompt in drawn) == 3
    files = [
        {
            path.name: path.read_bytes()
            for path in (tmp_path / run / "checkpoints/iteration-000003").glob("*.safetensors")
        }
        for run in ("run", "whole")
    ]
    assert files[0] and files[0] == files[1]


class Killed(BaseException):
    """As a kill, nothing answers it."""


@pytest.mark.parametrize("calls", [0, 1, 2], ids=["in the first evaluation", "in the second", "in the third"])
def test_an_evaluation_that_was_cut_off_is_made_on_resume(whole, tmp_path, calls):
    run = tmp_path / "run"
    trainer = Trainer(recipe(), run)
    evaluate, left = trainer.evaluation.run, [calls]

    def killed(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return evaluate(*arguments)

    trainer.evaluation.run = killed
    with pytest.raises(Killed):
        trainer.run()
    assert saved(run) == [[], ["iteration-000002"], ["iteration-000002", "iteration-000003"]][calls]
    assert Trainer(recipe(), run, resume=True).run()
    assert records(run) == records(whole)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2, 3]


def break_gradients(trainer, iterations):
    """A gradient of NaN in these iterations."""
    finish = trainer.weights.finish_gradients

    def broken(*arguments):
        if trainer.iteration + 1 in iterations:
            trainer.weights.trained()[0].grad.view(-1)[3] = float("nan")
        return finish(*arguments)

    trainer.weights.finish_gradients = broken


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, caplog):
    trainer = Trainer(recipe("evaluate.every=0", "train.steps_per_iteration=2"), tmp_path / "run")
    break_gradients(trainer, [2])
    assert trainer.run()
    found = records(tmp_path / "run")
    assert [r.get("steps_left_out", 0) for r in found] == [0, 2, 0]
    assert [r["step"] for r in found] == [2, 2, 4]
    assert "grad_norm" not in found[1] and "grad_norm" in found[2]
    assert "iteration 2: grad_norm: expected a finite number, got nan" in caplog.text
    assert all(value.isfinite().all() for value in trainer.weights.state().values())


def test_many_in_a_row_end_the_run_and_keep_what_is_good(tmp_path):
    last = IN_A_ROW + 2
    trainer = Trainer(recipe("evaluate.every=0", f"train.iterations={last + 3}"), tmp_path / "run")
    break_gradients(trainer, range(3, 99))
    with pytest.raises(
        UserError, match=rf"iteration {last}: grad_norm: .* {IN_A_ROW} optimizer steps in a row"
    ):
        trainer.run()
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest.name == f"iteration-{last - 1:06d}" and checkpoint.read_state(newest)["step"] == 2


def test_memory_that_runs_out_in_the_optimizer_ends_the_run_in_a_line(tmp_path):
    trainer = Trainer(recipe("evaluate.every=0", "checkpoint.every=1"), tmp_path / "run")
    step = trainer.optimizer.step

    def failing(*arguments):
        if trainer.iteration == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return step(*arguments)

    trainer.optimizer.step = failing
    with pytest.raises(UserError, match=r"iteration 2: out of memory: CUDA out of memory$"):
        trainer.run()
    assert saved(tmp_path / "run") == ["iteration-000001"]
    assert Trainer(recipe("evaluate.every=0"), tmp_path / "run", resume=True).run()


def test_a_damaged_newest_checkpoint_costs_its_iterations_alone(copied, whole, caplog):
    path = copied / "checkpoints" / "iteration-000003" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert Trainer(recipe(), copied, resume=True).run()
    named = [r.getMessage() for r in caplog.records if "iteration-000003" in r.getMessage()]
    assert len(named) == 1 and "training.safetensors is missing or damaged" in named[0]
    assert records(copied) == records(whole)
    assert saved(copied) == ["iteration-000002", "iteration-000003"]
    assert (copied / "checkpoints" / "damaged-iteration-000003").is_dir()


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/*"])
def test_checkpoints_that_are_gone_are_an_error(copied, gone):
    before = (copied / "metrics.jsonl").read_bytes()
    for path in list(copied.glob(gone)):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    with pytest.raises(UserError, match="its checkpoints are gone, though it came to iteration 3"):
        Trainer(recipe(), copied, resume=True)
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_a_run_that_ended_before_its_first_checkpoint_starts_over_beside_its_metrics(whole, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(recipe(), run)

    def killed():
        raise Killed

    trainer.save = killed
    with pytest.raises(Killed):
        trainer.run()
    before = (run / "metrics.jsonl").read_bytes()
    assert Trainer(recipe(), run, resume=True).run()
    assert records(run) == records(whole)
    assert (run / "metrics.jsonl.1").read_bytes() == before


@pytest.mark.parametrize(
    "change, words",
    [
        ("train.seed=7", "train.seed 42 -> 7"),
        ("loss.beta=5", "loss.beta .* -> 5"),
        ("model.lora_rank=4", "model.lora_rank 32 -> 4"),
        ("rewards={geneval: 2.0}", "rewards.geneval 1.0 -> 2.0"),
        ("rewards={geneval: 1.0, colorfulness: 1.0}", "rewards.colorfulness 'nothing' -> 1.0"),
        ("rollout.samples_per_prompt=3", "rollout.samples_per_prompt 2 -> 3"),
        ("snapshots.old=0/0.5/0.005/0.999", "snapshots.old"),
        ("train.weight_decay=0", "train.weight_decay"),
    ],
)
def test_changes_that_would_make_another_run_are_refused(copied, change, words):
    before = (copied / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"made with another recipe: {words}"):
        Trainer(recipe("train.iterations=4", change), copied, resume=True)
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_a_weight_that_is_written_otherwise_is_no_change(tmp_path):
    for before, after in itertools.permutations(("geneval: 1.0", "geneval: {}", "geneval: {weight: 1}"), 2):
        check_changes(recipe(f"rewards={{{before}}}").model_dump(), recipe(f"rewards={{{after}}}"), tmp_path)
    with pytest.raises(UserError, match=r"recipe: rewards.geneval.weight 1.0 -> 2.0; go on"):
        check_changes(recipe().model_dump(), recipe("rewards={geneval: {weight: 2.0}}"), tmp_path)


def test_prompts_that_are_held_out_stay_so(tmp_path):
    """A tenth of a file is, where evaluations are of no other; without any it would be trained on."""
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(100)))
    values = {
        "model": {"path": "org/name"},
        "rollout": {"prompts": str(path)},
        "rewards": {"colorfulness": 1},
    }
    on, off, other = (
        build_recipe(values, [change])
        for change in ("evaluate.every=20", "evaluate.every=0", f"evaluate.prompts={path}")
    )
    for before, after, words in (
        (on, off, "evaluate.every 20 -> 0, which trains on prompts that were held out"),
        (on, other, f"evaluate.prompts 'auto' -> '{path}', which trains on prompts that were held out"),
        (off, on, "evaluate.every 0 -> 20, which holds out what was trained on"),
    ):
        assert len(training_prompts(before).entries()) != len(training_prompts(after).entries())
        with pytest.raises(UserError, match=f"made with another recipe: {words}"):
            check_changes(before.model_dump(), after, tmp_path)
    check_changes(other.model_dump(), off, tmp_path)


def test_changes_that_are_honoured_are_named(copied, caplog):
    changes = ("train.learning_rate=1e-5", "train.micro_batch=2", "evaluate.every=1", "checkpoint.keep=1")
    changes += ("train.checkpointing=0.5", "train.kept_graphs=device", "train.trackers=[]")
    trainer = Trainer(recipe("train.iterations=4", *changes), copied, resume=True)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-5]
    assert "-> 1e-05" in caplog.text
    for change in (
        "train.iterations 3 -> 4",
        "train.micro_batch",
        "train.checkpointing",
        "train.kept_graphs",
        "train.trackers ['tensorboard'] -> []",
        "evaluate.every 2 -> 1",
        "checkpoint.keep",
    ):
        assert f"changed: {change}" in caplog.text
    assert trainer.run()
    assert (
        checkpoint.read_state(checkpoint.newest(copied / "checkpoints"))["recipe"]["evaluate"]["every"] == 1
    )


def test_a_checkpoint_of_another_run_is_not_compared_with_this_one_s_first_evaluation(copied, capsys):
    folder = copied / "checkpoints" / "iteration-000003"
    state = checkpoint.read_state(folder)
    assert base_scores(Source.of(str(folder))) is not None and not capsys.readouterr().err
    for change in ({"record": state["record"] | {"grad_norm": -1.0}}, {"iteration": 9}):
        (folder / "state.json").write_text(json.dumps(state | change))
        durable.seal(folder)
        assert base_scores(Source.of(str(folder))) is None
        assert "another run's by its metrics; not compared" in " ".join(capsys.readouterr().err.split())


def test_what_makes_evaluations_others():
    judge = "eval_rewards={pickscore: {path: /a/b, workers: 2}}"
    for same in (
        ("evaluate.prompts=/a/x.txt", "evaluate.prompts=/b/x.txt"),
        ("evaluate.every=2", "evaluate.every=1"),
        ("rollout.prompts=/a/x.txt", "rollout.prompts=/a/y.txt"),  # small models have a list of their own
        (judge, "eval_rewards={pickscore: {path: /a/b}, aesthetic: 1}"),
        (judge, "eval_rewards={}"),
        ("evaluate.every=2", "evaluate.drift=2"),
    ):
        assert evaluated_alike(*map(recipe, same)), same
    for other in (
        ("evaluate.prompts=/a/x.txt", "evaluate.prompts=/a/y.txt"),
        ("evaluate.guidance_scale=1", "evaluate.guidance_scale=4"),
        ("evaluate.samples_per_prompt=1", "evaluate.samples_per_prompt=2"),
        (judge, "eval_rewards={pickscore: {path: /a/c}}"),
        ("evaluate.drift=2", "evaluate.drift=8"),
    ):
        assert not evaluated_alike(*map(recipe, other)), other


def test_other_prompts_for_training_are_marked(copied):
    """Their rewards are no measure for one another."""
    changed = recipe("train.iterations=5", "rollout.prompts=builtin-heldout")
    assert Trainer(changed, copied, resume=True).run()
    since = [record.get(TRAINED_ALIKE) for record in read_metrics(copied)]
    assert since == [None, None, None, None, 4, 4]
    assert not any(EVALUATED_ALIKE in record for record in read_metrics(copied))


def test_prompts_are_told_apart_by_the_weights_of_all_files():
    """Two files in different folders may have one name."""
    lists = {"/a/prompts.txt": 3.0, "/b/prompts.txt": 1.0}
    trained = lists_of(recipe(f"rollout.prompts={lists}"))
    assert trained == lists_of(recipe("rollout.prompts={/c/prompts.txt: 3, /b/prompts.txt: 1}"))
    for other in ("{/a/prompts.txt: 5, /b/prompts.txt: 1}", "/b/prompts.txt", "/a/prompts.txt"):
        assert trained != lists_of(recipe(f"rollout.prompts={other}")), other


def test_how_many_questions_a_model_is_asked_at_a_time_may_change(tmp_path):
    """As its timeout and retries may: a server that is too busy for eight is no reason to train anew."""
    asked = "rewards={vlm: {url: 'http://127.0.0.1:8000/v1', model: m, at_once: %d}}"
    check_changes(recipe(asked % 8).model_dump(), recipe(asked % 2), tmp_path)
    judges = (f"eval_{asked % count}" for count in (8, 2))
    assert evaluated_alike(*map(recipe, judges))


HOLDER = """
import sys, time
from pathlib import Path
from crd_fast.run.lock import RunLock

lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_another_process_is_kept_out_until_it_is_dead(copied):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(copied)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is writing to this run"):
            Trainer(recipe(), copied, resume=True)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (copied / LOCK).exists()
    RunLock(copied).close()
    assert Trainer(recipe(), copied, resume=True).run()


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written to: Not a directory"):
        RunLock(tmp_path / "file" / "run")
