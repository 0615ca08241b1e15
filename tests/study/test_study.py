"""`crd-fast study`: runs over arms and seeds, gone on with, summed up."""

import functools
import json
import signal
from dataclasses import replace
from datetime import date

import pytest
import torch
import yaml
from scipy import stats

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.plan.planner import Planner
from crd_fast.run.metrics import read_metrics
from crd_fast.run.observer import Observer
from crd_fast.run.scores import read_scores, scores_path
from crd_fast.study.results import _reached, plot, seeds_mean, table, with_error
from crd_fast.study.run import FLOPS, Ledger, flops_by_iteration, is_whole, run_cell, run_in_turn, runs_left
from crd_fast.study.study import Study, cells, load_study, study_names
from crd_fast.train.changes import differences
from crd_fast.train.trainer import Trainer
from tests.training.test_stopping import Signals
from tools.study_tables import merged

PROMPTS, SAMPLES, STEPS = 2, 4, 2
STUDY = {
    "question": "Does half do?",
    "tasks": {
        "shapes": {
            "recipe": "builtin",
            "measure": "overall",
            "judges": ["clean"],
            "overrides": {
                "rollout.prompts_per_iteration": PROMPTS,
                "rollout.samples_per_prompt": SAMPLES,
                "rollout.steps": STEPS,
                "rollout.solver": "euler",
                "loss.anchor_fraction": 1.0,
                "train.timesteps": 1,
                "evaluate.max_prompts": 2,
                "evaluate.steps": 2,
            },
        }
    },
    "seeds": [1, 2],
    "overrides": {"train.iterations": 2, "evaluate.every": 1, "checkpoint.every": 1},
    "arms": {"whole": {}, "half": {"train.backward_fraction": 0.5}},
}


class Stop(Observer):
    def iteration_done(self, record):
        raise KeyboardInterrupt


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return path


def test_studies_that_ship_have_arms_that_can_run():
    for name in study_names():
        found = list(cells(load_study(name)))
        assert {cell.seed for cell in found} == set(load_study(name).seeds) and len(
            load_study(name).seeds
        ) >= 3


@pytest.mark.parametrize(
    ("recipe", "study", "arm"),
    [("builtin-long", "long", "both-to-0.9"), ("builtin-lora", "adapters", "cards")],
)
def test_recipes_train_as_the_arms_do_that_decided_them(recipe, study, arm):
    of_arm = next(cell for cell in cells(load_study(study)) if cell.arm == arm).recipe
    changed = {key for key, _ in differences(load_recipe(recipe).model_dump(), of_arm.model_dump())}
    looks_on = {key for key in changed if key.startswith(("evaluate.", "eval_rewards", "checkpoint."))}
    assert changed - looks_on <= {"train.iterations", "train.seed"}


def test_a_study_runs_resumes_and_sums_up(study, inside, tmp_path):
    output = tmp_path / "out"
    code, text, err = inside("study", study, "--output", output, "--arm", "whole", "--seed", "1")
    assert code == 0, err
    run = output / "shapes" / "whole" / "seed-1"
    assert not (run / "checkpoints").exists()
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    # one that ends after its first checkpoint
    recipe = next(
        cell for cell in cells(load_study(str(study))) if (cell.arm, cell.seed) == ("half", 1)
    ).recipe
    folder = output / "shapes" / "half" / "seed-1"
    stopped = Trainer(recipe, folder)
    stopped.observer.add(Ledger(folder / FLOPS, 0, {}))
    stopped.observer.add(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.run()

    code, text, err = inside("study", study, "--output", output)
    assert code == 0, err
    assert "whole/seed-1" not in text and text.count("run ") == 3
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before
    records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {(r["arm"], r["seed"]) for r in records} == {(a, s) for a in STUDY["arms"] for s in STUDY["seeds"]}
    ends = {(r["arm"], r["seed"]): r for r in records if r["iteration"] == 2}
    assert all(r["samples"] == 2 * PROMPTS * SAMPLES and r["seconds"] > 0 for r in ends.values())
    table = (output / "table.md").read_text()
    assert "Does half do?" in table and "| whole | 2 |" in table and "| half | 2 |" in table
    drawn = (output / "plot.svg").read_text()
    assert drawn.count("<svg") == 1
    assert inside("study", study, "--output", output, "--results")[0] == 0
    assert (output / "plot.svg").read_text() == drawn
    assert not any("paired/overall" in end for (arm, _), end in ends.items() if arm == "whole")
    for seed in STUDY["seeds"]:
        arms = [
            read_scores(scores_path(output / "shapes" / arm / f"seed-{seed}", 2)) for arm in STUDY["arms"]
        ]
        one, two = (scores.values["overall"] for scores in arms)
        assert ends["half", seed]["paired/overall"] == pytest.approx((two - one).mean())
        assert ends["half", seed]["paired_error/overall"] == pytest.approx(stats.sem(two - one))
    differences = [ends["half", seed]["paired/overall"] for seed in STUDY["seeds"]]
    sign = "" if sum(differences) < 0 else "+"
    assert f"| {sign}{with_error(differences)} |" in table

    scores_path(output / "shapes" / "half" / "seed-1", 2).unlink()  # as a run of an earlier version
    assert inside("study", study, "--output", output, "--results")[0] == 0
    assert "(1 of 2 seeds) |" in (output / "table.md").read_text()

    ledger = output / "shapes" / "half" / "seed-2" / FLOPS  # as after `crd-fast train --resume`
    ledger.write_text(ledger.read_text().splitlines()[0] + "\n")
    code, text, err = inside("study", study, "--output", output, "--results")
    assert code == 0 and "seed-2: operations of 1 of 2 iterations were not counted" in text, err
    written = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    of_run = [record["pflop"] for record in written if (record["arm"], record["seed"]) == ("half", 2)]
    assert of_run[-1] == pytest.approx(2 * of_run[-2]) and of_run[-2] > 0
    ledger.unlink()
    code, text, err = inside("study", study, "--output", output, "--results")
    assert code == 0 and "seed-2: left out, its operations were not counted" in text, err

    settings = run / "config.yaml"  # as of a recipe that has changed since
    settings.write_text(
        settings.read_text().replace("  learning_rate: 0.0003\n", "  learning_rate: 0.0007\n")
    )
    code, _, err = inside("study", study, "--output", output)
    assert code == 2 and "whole/seed-1: made with other settings: train.learning_rate 0.0007 -> 0.0003" in err
    code, text, _ = inside("study", study, "--output", output, "--results")
    assert code == 0 and "left out" in text
    assert "| whole | 1 |" in (output / "table.md").read_text()


def test_results_of_nothing_are_said_to_be_none(study, inside, tmp_path):
    code, text, _ = inside("study", study, "--output", tmp_path / "out", "--results")
    assert code == 0 and f"no run in {tmp_path / 'out'} is whole: nothing is written" in " ".join(
        text.split()
    )


def test_runs_are_kept_where_the_study_looks_on_otherwise(study, inside, tmp_path):
    """As a run that was made before the judges and evaluations that the study has now."""
    output = tmp_path / "out"
    asked = ("study", study, "--output", output, "--arm", "whole", "--seed", "1")
    assert inside(*asked)[0] == 0
    before = (output / "shapes" / "whole" / "seed-1" / "metrics.jsonl").read_bytes()
    shapes = STUDY["tasks"]["shapes"]
    newer = {
        "eval_rewards": {"diversity": 1.0},
        "evaluate.drift": 4.5,
        "checkpoint.keep": 1,
        "train.trackers": [],
    }
    task = shapes | {"judges": ["clean", "drift/guided"], "overrides": shapes["overrides"] | newer}
    study.write_text(yaml.safe_dump(STUDY | {"tasks": {"shapes": task}}, sort_keys=False))
    code, text, err = inside(*asked)
    assert code == 0 and "run 1" not in text, err
    assert (output / "shapes" / "whole" / "seed-1" / "metrics.jsonl").read_bytes() == before
    head, _, row = (output / "table.md").read_text().split("\n\n")[2].splitlines()
    by_name = dict(zip(head.split("|"), row.split("|")))
    assert by_name[" drift/guided "].strip() == "" and float(by_name[" overall "]) >= 0
    task = task | {"overrides": task["overrides"] | {"rollout.without_categories": ["counting"]}}
    study.write_text(yaml.safe_dump(STUDY | {"tasks": {"shapes": task}}, sort_keys=False))
    code, _, err = inside(*asked)
    assert code == 2 and "made with other settings: rollout.without_categories [] -> ['counting']" in err
    apart = shapes | {"overrides": shapes["overrides"] | {"evaluate.guidance_scale": 4.5}}
    study.write_text(yaml.safe_dump(STUDY | {"tasks": {"shapes": apart}}, sort_keys=False))
    code, _, err = inside(*asked)
    assert code == 2 and "made with other settings: evaluate.guidance_scale 1.0 -> 4.5" in err


def test_prompts_in_a_file_of_ones_own(study, inside, tmp_path, monkeypatch):
    """Named from where the command is given: the run's folder has the whole path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a photo of a square\na photo of a circle\n")
    own = {"rollout.prompts": "prompts.txt", "evaluate.prompts": "prompts.txt", "train.iterations": 1}
    shapes = STUDY["tasks"]["shapes"] | {"measure": "reward_mean", "judges": []}
    shapes |= {"overrides": shapes["overrides"] | own | {"rewards": {"colorfulness": 1.0}}}
    study.write_text(yaml.safe_dump(STUDY | {"tasks": {"shapes": shapes}}, sort_keys=False))
    asked = ("study", study, "--output", "out", "--arm", "whole", "--seed", "1")
    code, text, err = inside(*asked)
    assert code == 0 and "written: out/table.md" in text, err
    code, text, err = inside(*asked)
    assert code == 0 and "run 1" not in text and "written: out/table.md" in text, err
    misspelt = STUDY | {"tasks": {"shapes": shapes | {"measure": "reward_maen"}}}
    study.write_text(yaml.safe_dump(misspelt, sort_keys=False))
    code, _, err = inside(*asked, "--results")
    assert code == 2 and "shapes.measure: expected one of its evaluations', got reward_maen" in err
    assert "did you mean 'reward_mean'" in err
    study.write_text(yaml.safe_dump(STUDY | {"tasks": {"shapes": shapes}}, sort_keys=False))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "prompts.txt").write_text("a photo of a triangle\n")
    code, _, err = inside("study", study, "--output", tmp_path / "out", *asked[4:])
    assert code == 2 and "made with other settings: rollout.prompts" in err


def test_a_run_that_was_stopped_in_its_last_evaluation_is_gone_on_with(study, inside, tmp_path):
    output = tmp_path / "out"
    cell = next(cells(load_study(str(study))))
    folder = output / cell.folder
    stopped = Trainer(cell.recipe, folder, observer=Signals("evaluation", 1, signal.SIGTERM))
    stopped.observer.add(Ledger(folder / FLOPS, 0, {}))
    stopped.run()
    assert [record["iteration"] for record in read_metrics(folder)] == [0, 1, 2]
    assert not is_whole(folder, cell)
    code, text, err = inside("study", study, "--output", output, "--arm", "whole", "--seed", "1")
    assert code == 0 and "run 1 of 1" in text, err
    records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2]


def test_operations_of_a_rollout_in_two_parts_are_those_of_the_whole(study, tmp_path, monkeypatch):
    cell = next(cells(load_study(str(study))))
    settings = {"rollout.micro_batch": 2, "evaluate.every": 0}
    recipe = build_recipe(cell.recipe.model_dump(), [f"{key}={value}" for key, value in settings.items()])
    cell = replace(cell, recipe=recipe)
    assert run_cell(cell, tmp_path / "whole")
    once = Signals("rollout", 4, signal.SIGTERM)  # in the second iteration
    monkeypatch.setattr("crd_fast.study.run.Trainer", functools.partial(Trainer, observer=once))
    assert not run_cell(cell, tmp_path / "parts") and run_cell(cell, tmp_path / "parts")
    whole, parts = (flops_by_iteration(tmp_path / name / FLOPS) for name in ("whole", "parts"))
    assert whole == parts and set(whole) == {1, 2}


def test_ctrl_c_in_the_last_iteration_of_a_run_ends_the_study(study, tmp_path, monkeypatch):
    once = Signals("rollout", 1, signal.SIGINT)  # in the second iteration of two
    monkeypatch.setattr("crd_fast.study.run.Trainer", functools.partial(Trainer, observer=once))
    found, first = load_study(str(study)), next(cells(load_study(str(study))))
    begun = []
    assert not run_in_turn(tmp_path, runs_left(found, tmp_path, lambda cell: cell.seed == 1), begun.append)
    assert len(begun) == 1 and is_whole(tmp_path / first.folder, first)
    assert not runs_left(found, tmp_path, lambda cell: cell == first)


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path):
    path = tmp_path / FLOPS
    path.write_text('{"iteration": 1, "flops": 3.0}\n{"iteration": 2, "fl')
    ledger = Ledger(path, 1, {"old": 2.0})
    with ledger.phase("iteration"), torch.no_grad(), ledger.branch("old", 5):
        pass
    assert flops_by_iteration(path) == {1: 3.0, 2: 10.0}


def test_seeds_that_were_evaluated_at_other_iterations():
    """Means are of the evaluations that all seeds have."""
    found = Study(**STUDY)
    records = [
        {"task": "shapes", "arm": "whole", "seed": seed, "iteration": i, "pflop": i, "samples": i}
        | {"seconds": i, "eval/overall": i + seed}
        for seed, iterations in ((1, (0, 1, 2)), (2, (0, 2)))
        for i in iterations
    ]
    assert seeds_mean({1: records[:3], 2: records[3:]}, "eval/overall").tolist() == [1.5, 3.5]
    assert plot(found, records).axes


def test_operations_are_counted_from_the_rows_of_every_forward(study, inside, tmp_path):
    output = tmp_path / "out"
    assert inside("study", study, "--output", output, "--seed", "2")[0] == 0
    found = [cell for cell in cells(load_study(str(study))) if cell.seed == 2]
    of_row = Planner(found[0].recipe).plan().row_flops
    forward, whole = of_row["old"], of_row["policy_with_gradient"] + of_row["backward"]
    # a backward pass is two products for each of the forward's; attention's recomputes one more
    assert 2.5 * forward < whole <= 3.1 * forward
    pairs = PROMPTS * SAMPLES
    rollout = pairs * STEPS * forward
    for cell, update in zip(
        found,
        (
            # the second iteration runs old; the first does not, because old is the policy
            (3 * forward + whole) * pairs,
            (4 * forward + whole / 2) * pairs,
        ),
    ):
        lines = (output / cell.folder / "flops.jsonl").read_text().splitlines()
        assert json.loads(lines[1])["flops"] == pytest.approx(rollout + update)


def test_mistakes_are_one_line(study, inside, tmp_path):
    for arguments, message in (
        (["cots"], "did you mean 'cost'"),
        ([study, "--arm", "hole"], "did you mean 'whole'"),
        ([study, "--seed", "3"], "got 3"),
    ):
        code, _, err = inside("study", *arguments, "--output", tmp_path / "no")
        assert code == 2 and message in err and not (tmp_path / "no").exists()
    for change, message in (
        ({"arms": {"a/b": {}}}, "a/b"),
        ({"arms": {"odd": {"train.timestep": 1}}}, "unknown key"),
        ({"seed": [1]}, "seed"),
        ({"seeds": [1, 2, 1]}, r"seeds: expected different ones, got \[1, 2, 1\]"),
        ({"arms": {"..": {}}}, r"\.\."),
        ({"arms": {"one": {"train.seed": 7}}}, "train.seed: expected under seeds"),
        ({"arms": {"one": {"train": {"seed": 7}}}}, "train.seed: expected under seeds"),
        (
            {"arms": {"one": {"rewards.mine": {"since": date(2024, 1, 1)}}}},
            "study: rewards.mine: expected text",
        ),
    ):
        study.write_text(yaml.safe_dump(STUDY | change, sort_keys=False))
        with pytest.raises(UserError, match=message):
            load_study(str(study))


def test_a_tasks_recipe_is_looked_for_beside_the_study(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"extends": "builtin", "train": {"iterations": 7}}))
    task = {"recipe": "mine.yaml", "measure": "overall"}
    values = STUDY | {"tasks": {"shapes": task, "shipped": task | {"recipe": "builtin"}}, "overrides": {}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    mine, shipped = (
        next(cell for cell in cells(load_study(file)) if cell.task == name) for name in values["tasks"]
    )
    assert mine.recipe.train.iterations == 7 != shipped.recipe.train.iterations


def test_settings_of_a_task_come_after_the_studys_and_those_of_an_arm_last():
    task = STUDY["tasks"]["shapes"] | {"overrides": {"train.iterations": 3, "eval_rewards.diversity": {}}}
    judged = {"eval_rewards": {"colorfulness": {}}, "train.iterations": 2}
    arms = {"whole": {}, "long": {"train.iterations": 5}}
    found = cells(Study(**STUDY | {"tasks": {"shapes": task}, "overrides": judged, "arms": arms}))
    whole, long, *_ = (cell.recipe for cell in found)
    assert (whole.train.iterations, long.train.iterations) == (3, 5)
    assert list(whole.eval_rewards) == ["colorfulness", "diversity"]


def test_what_an_arm_changes_stays_changed_where_a_task_sets_several_keys_of_a_section():
    task = STUDY["tasks"]["shapes"] | {"overrides": {"loss": {"kl_beta": 0.5}}}
    arms = {"one": {}, "two": {"loss.beta": 3}}
    found = cells(Study(**STUDY | {"tasks": {"shapes": task}, "overrides": {"loss.beta": 2}, "arms": arms}))
    assert [(cell.recipe.loss.beta, cell.recipe.loss.kl_beta) for cell in found][:2] == [(2, 0.5), (3, 0.5)]


def test_text_of_a_study_reaches_the_recipe_as_it_is():
    judge = {"eval_rewards": {"vlm": {"url": "http://a/v1", "model": "b", "question": "Is it 😀 or é?"}}}
    first = next(cells(Study(**STUDY | {"overrides": judge})))
    assert first.recipe.eval_rewards["vlm"]["question"] == "Is it 😀 or é?"


def test_a_judge_that_was_not_installed_has_an_empty_cell():
    task = STUDY["tasks"]["shapes"] | {"judges": ["judge/easyocr"]}
    study = Study(**STUDY | {"tasks": {"shapes": task}})
    spent = {"pflop": 1.0, "samples": 8, "seconds": 2.0, "cpu": "one", "threads": 1, "commit": "abc"}
    records = [
        {"task": "shapes", "arm": arm, "seed": 1, "iteration": 2, "eval/overall": 0.5, **spent, **judged}
        for arm, judged in (("whole", {}), ("half", {"eval/judge/easyocr": 0.25}))
    ]
    text = table(
        study, [*records, records[1] | {"seed": 2, "eval/judge/easyocr": 0.75}, records[0] | {"seed": 2}]
    )
    assert "| 0.5 ± 0.25 |" in text
    later = {key: value for key, value in records[1].items() if "easyocr" not in key} | {"seed": 2}
    assert "| 0.25 (1 of 2 seeds) |" in table(study, [*records, later])
    text = table(study, records)
    assert "| whole | 1 | 1 | 8 | 2 | 0.5 |  |" in text and "| half | 1 | 1 | 8 | 2 | 0.5 | 0.25 |" in text


def test_a_value_is_reached_where_the_line_crosses_it():
    ends = ((0, 0.0, 0.2), (9, 4.0, 0.4))
    runs = {1: [{"iteration": i, "pflop": spent, "eval/x": value} for i, spent, value in ends]}
    assert _reached(runs, "x", 0.3) == "2" and _reached(runs, "x", 0.5) == "not reached"
    assert with_error([0.2, 0.4]) == "0.3 ± 0.1" and with_error([0.21234]) == "0.212"


def test_results_that_were_made_elsewhere_stay_beside_new_ones():
    study = Study(**STUDY)
    known = [
        {"task": "shapes", "arm": arm, "seed": seed, "iteration": iteration, "commit": "old"}
        for seed, arm in ((1, "whole"), (1, "half"), (2, "whole"))
        for iteration in (0, 2)
    ]
    gone = known[0] | {"arm": "no-longer"}
    again = [record | {"commit": "new"} for record in known[2:4]]
    more = [record | {"seed": 2} for record in again]
    assert merged(study, [gone, *known], [*more, *again]) == [*known[:2], *again, *known[4:], *more]
