"""`checkpoints/best`: which one it is, and what it becomes where a run goes on."""

import dataclasses
import json
import shutil

from crd_fast.commands.evaluate import base_scores
from crd_fast.run.metrics import EVALUATED_ALIKE, read_metrics
from crd_fast.train.checkpoints import SCORE
from crd_fast.train.inference import Source
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from tests.training.short_runs import recipe, saved


def test_the_best_by_held_out_score_stays(tmp_path):
    run, scores = tmp_path / "run", iter([0.5, 0.1, 0.7, 0.7, 0.3, 0.6])
    settings = recipe("train.iterations=5", "evaluate.every=1", "checkpoint.keep=1")
    trainer = Trainer(settings, run)
    evaluate = trainer.evaluation.run

    def scored(*arguments):
        found = evaluate(*arguments)
        return dataclasses.replace(found, metrics=found.metrics | {"eval/reward_mean": next(scores)})

    trainer.evaluation.run = scored
    assert trainer.run()
    assert saved(run) == ["iteration-000002", "iteration-000005"]
    best = run / "checkpoints" / "best"
    assert checkpoint.read_state(checkpoint.find(best))["iteration"] == 2
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    more = recipe("train.iterations=6", "evaluate.every=1", "checkpoint.keep=1")
    assert Trainer(more, tmp_path / "copy", resume=True).run()  # the score of 2 is read from the metrics
    assert saved(tmp_path / "copy") == ["iteration-000002", "iteration-000006"]


def test_a_run_that_ended_before_it_marked_the_best_marks_it_when_it_goes_on(copied):
    lines = read_metrics(copied)
    for record in lines:
        if SCORE in record:
            record[SCORE] = float(record["iteration"] == 2)
    (copied / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    folder = copied / "checkpoints"
    checkpoint.mark_best(folder / "iteration-000003")
    Trainer(recipe("train.iterations=4"), copied, resume=True)
    assert checkpoint.marked_best(folder) == 2 and checkpoint.find(copied).name == "iteration-000002"


def test_a_damaged_best_leaves_no_mark_for_the_next_of_its_name(copied, caplog):
    folder = copied / "checkpoints"
    checkpoint.mark_best(folder / "iteration-000003")
    (folder / "iteration-000003" / checkpoint.TENSORS).write_bytes(b"")
    Trainer(recipe("train.iterations=4"), copied, resume=True)
    assert (folder / "damaged-iteration-000003").is_dir()
    assert checkpoint.marked_best(folder) == 2


def test_the_best_is_found_anew_where_evaluations_are_others(copied, caplog):
    """Scores of other prompts are no measure for those that follow."""
    lines = read_metrics(copied)
    for record in lines:
        if SCORE in record:
            record[SCORE] = 2.0 * (record["iteration"] == 3)  # more than there is
    (copied / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert Trainer(recipe("train.iterations=4", "evaluate.drift=1"), copied, resume=True).run()
    best = copied / "checkpoints" / checkpoint.BEST
    assert best.resolve().name == "iteration-000003" and "found anew" not in caplog.text
    changed = ("train.iterations=5", "evaluate.drift=1", "evaluate.max_prompts=3", "checkpoint.keep=1")
    trainer = Trainer(recipe(*changed), copied, resume=True)
    seen, evaluate = [], trainer.evaluation.run
    trainer.evaluation.run = lambda *given: seen.append(best.resolve(strict=True)) or evaluate(*given)
    assert trainer.run() and "found anew" in caplog.text
    assert [path.name for path in seen] == ["iteration-000003"]  # it stays until another is found
    assert best.resolve().name == "iteration-000005"
    assert Trainer(recipe(*changed), copied, resume=True).checkpoints._best[1] == -5
    since = {record["iteration"]: record.get(EVALUATED_ALIKE) for record in read_metrics(copied)}
    assert since == {0: None, 1: None, 2: None, 3: None, 4: None, 5: 5}
    assert base_scores(Source.of(str(copied / "checkpoints" / "iteration-000003"))) is not None
    assert base_scores(Source.of(str(copied))) is None  # of other pictures than its own


def test_what_was_left_out_meanwhile_is_compared_with_what_it_was(copied, caplog):
    for iterations, drift in ((4, 2), (5, None)):
        settings = (f"train.iterations={iterations}", f"evaluate.drift={drift or 'null'}", "evaluate.every=1")
        assert Trainer(recipe(*settings), copied, resume=True).run()
    for drift, others in ((2, 0), (8, 1)):
        settings = ("train.iterations=6", f"evaluate.drift={drift}", "evaluate.every=1")
        Trainer(recipe(*settings), copied, resume=True).checkpoints.close()
        assert caplog.text.count("evaluations are not as before") == others
