"""What a study found: its raw metrics as one file, a table, a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from crd_fast.errors import UserError, did_you_mean
from crd_fast.run.log import ENVIRONMENT
from crd_fast.run.metrics import read_metrics
from crd_fast.run.new_files import write_atomically
from crd_fast.run.scores import Scores, compare_metric, scores_of
from crd_fast.study.run import FLOPS, flops_by_iteration, is_whole, other_settings
from crd_fast.study.study import Study, cells

RAW, TABLE, PLOT = "results.jsonl", "table.md", "plot.svg"
SECONDS = ("seconds_rollout", "seconds_reward", "seconds_update")


def collect(study: Study, output: Path, say: Callable[[str], None] = print) -> list[dict]:
    """A record of each evaluation of the runs that are whole, with what was spent before it.

    pflop: 1e15 floating point operations; samples: pictures that were rewarded; seconds: of rollout, rewards
    and updates. The machine and commit are the run's. The last of a run has the difference of the study's
    measure from the last of the first arm with its seed, paired picture by picture, with its standard error
    over prompts: `paired/MEASURE`, `paired_error/MEASURE`.
    """
    found = []
    baselines: dict[tuple[str, int], Scores | None] = {}
    for cell in cells(study):
        folder = output / cell.folder
        if not is_whole(folder, cell):
            continue
        if other := other_settings(folder, cell):
            say(f"{folder}: left out, it was made with other settings: {other}")
            continue
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        records, flops = read_metrics(folder), flops_by_iteration(folder / FLOPS)
        uncounted = [r["iteration"] for r in records if r["iteration"] and r["iteration"] not in flops]
        if uncounted and not flops:
            say(f"{folder}: left out, its operations were not counted: crd-fast study alone does so")
            continue
        if uncounted:
            say(
                f"{folder}: operations of {len(uncounted)} of {records[-1]['iteration']} iterations were not "
                "counted, as crd-fast study alone does so; they are taken for the mean of the others"
            )
            flops |= dict.fromkeys(uncounted, statistics.fmean(flops.values()))
        rollout = cell.recipe.rollout
        spent, last = {"pflop": 0.0, "samples": 0, "seconds": 0.0}, None
        for record in records:
            if record["iteration"]:
                spent["pflop"] += flops[record["iteration"]] / 1e15
                spent["samples"] += rollout.prompts_per_iteration * rollout.samples_per_prompt
                spent["seconds"] += sum(record[name] for name in SECONDS)
            if "eval/images" in record:
                _check_measure(study, cell.task, record)
                run = {"task": cell.task, "arm": cell.arm, "seed": cell.seed, **spent}
                where = {name: environment[name] for name in ("cpu", "threads", "gpu", "commit")}
                found.append(run | record | where)
                last = scores_of(folder, record["iteration"])
        if cell.arm == study.baseline:
            baselines[cell.task, cell.seed] = last
        measure = study.tasks[cell.task].measure
        both = compare_metric(baselines.get((cell.task, cell.seed)), last, measure)
        if both is not None and not math.isnan(both.error) and cell.arm != study.baseline:
            found[-1] |= {f"paired/{measure}": both.difference, f"paired_error/{measure}": both.error}
    return found


def _check_measure(study: Study, task: str, record: dict) -> None:
    """Raises UserError where an evaluation has not what the task is measured by."""
    measure = study.tasks[task].measure
    if f"eval/{measure}" not in record:
        known = [name.removeprefix("eval/") for name in record if name.startswith("eval/")]
        near = did_you_mean(measure, known) or f"; known: {', '.join(known)}"
        raise UserError(f"tasks.{task}.measure: expected one of its evaluations', got {measure}{near}")


def write_results(study: Study, output: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Raw metrics, table and plot of what is whole. Returns the files; none where nothing is."""
    records = collect(study, output, say)
    return write_records(study, records, output) if records else []


def write_records(study: Study, records: list[dict], output: Path) -> list[Path]:
    """The three files of the records that `collect` made, of this machine's runs or of others' as well."""
    files = [output / name for name in (RAW, TABLE, PLOT)]
    write_atomically(files[0], "".join(json.dumps(record) + "\n" for record in records))
    write_atomically(files[1], table(study, records))
    _save_svg(plot(study, records), files[2])
    return files


Runs = dict[int, list[dict]]  # by seed, the evaluations of a run in their order


def by_arm(study: Study, records: list[dict], task: str) -> dict[str, Runs]:
    """The arms that have a whole run, in the study's order."""
    found: dict[str, Runs] = {arm: defaultdict(list) for arm in study.arms}
    for record in records:
        if record["task"] == task and record["arm"] in found:
            found[record["arm"]][record["seed"]].append(record)
    return {arm: runs for arm, runs in found.items() if runs}


def table(study: Study, records: list[dict]) -> str:
    """Markdown: what each arm spent, where it ended, and what it needed to reach the first arm's end."""
    lines = [study.question, ""]
    for name, task in study.tasks.items():
        arms = by_arm(study, records, name)
        if not arms:
            continue
        wanted = None
        held_out = (task.measure, *task.judges)
        measures = [f"eval/{name}" for name in held_out] + task.watched
        shown = [name.removeprefix("judge/") for name in held_out]
        shown += [f"{name} in training" if name in held_out else name for name in task.watched]
        head = ["arm", "seeds", "PFLOP", "samples", "seconds", *shown]
        paired = any(f"paired/{task.measure}" in run[-1] for runs in arms.values() for run in runs.values())
        head += [f"{task.measure} from {study.baseline}'s"] if paired else []
        head.append(f"PFLOP to {study.baseline}'s end")
        lines += [
            f"{name}, held out:",
            "",
            "| " + " | ".join(head) + " |",
            "| --- |" + " ---: |" * (len(head) - 1),
        ]
        for arm, runs in arms.items():
            ends = [run[-1] for run in runs.values()]
            cells_ = [arm, str(len(runs))]
            cells_ += [
                format(statistics.median(end[key] for end in ends), form) for key, form in SPENT.items()
            ]
            for measure in measures:
                # a judge may not be installed, or newer than the run
                judged = [end[measure] for end in ends if measure in end]
                cells_.append(f"{with_error(judged)}{_some(judged, ends)}" if judged else "")
            cells_ += [_paired(ends, task.measure)] if paired else []
            end = statistics.fmean(end[f"eval/{task.measure}"] for end in ends)
            wanted = end if arm == study.baseline else wanted
            cells_.append("" if wanted is None else _reached(runs, task.measure, wanted))
            lines.append("| " + " | ".join(cells_) + " |")
        lines.append("")
    where = {(r["cpu"], r["threads"], r["commit"]) for r in records}
    lines += [
        f"{cpu}, {threads} thread(s), commit {commit}" for cpu, threads, commit in sorted(where, key=str)
    ]
    return "\n".join(lines) + "\n"


SPENT = {"pflop": ".3g", "samples": ".0f", "seconds": ".0f"}  # the seeds' median, and how it is written


def with_error(values: list[float]) -> str:
    """The mean and, of several seeds, its standard error."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}"


def _paired(ends: list[dict], measure: str) -> str:
    """The mean difference from the first arm; its error over several seeds, or over the prompts of one.

    Where not all seeds could be paired, it is said how many were.
    """
    paired = [end for end in ends if f"paired/{measure}" in end]
    if not paired:
        return ""
    if len(paired) == 1:
        text = f"{paired[0][f'paired/{measure}']:.3g} ± {paired[0][f'paired_error/{measure}']:.2g}"
    else:
        text = with_error([end[f"paired/{measure}"] for end in paired])
    return f"{'' if text.startswith('-') else '+'}{text}{_some(paired, ends)}"


def _some(known: list, ends: list[dict]) -> str:
    """How many of the seeds a cell is of, where it is not all."""
    return f" ({len(known)} of {len(ends)} seeds)" if len(known) < len(ends) else ""


def _reached(runs: Runs, measure: str, wanted: float) -> str:
    """The first PFLOP where the seeds' mean, straight between evaluations, has the wanted value."""
    spent, value = mean_curve(runs, measure)
    for i in np.flatnonzero(value >= wanted):
        if i == 0:
            return f"{spent[0]:.3g}"
        part = (wanted - value[i - 1]) / (value[i] - value[i - 1])
        return f"{spent[i - 1] + part * (spent[i] - spent[i - 1]):.3g}"
    return "not reached"


def mean_curve(runs: Runs, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """PFLOP and measure of each evaluation, means over the seeds."""
    return seeds_mean(runs, "pflop"), seeds_mean(runs, f"eval/{measure}")


def seeds_mean(runs: Runs, key: str) -> np.ndarray:
    """Means over the seeds, of the evaluations at the iterations that all of them have: (evaluations,)."""
    by_iteration = [{record["iteration"]: record[key] for record in run} for run in runs.values()]
    common = [iteration for iteration in by_iteration[0] if all(iteration in run for run in by_iteration)]
    return np.array([statistics.fmean(run[iteration] for run in by_iteration) for iteration in common])


def plot(study: Study, records: list[dict]) -> Figure:
    """The measure against PFLOP, samples and seconds, a row for each task; thin lines are the seeds."""
    tasks = [task for task in study.tasks if by_arm(study, records, task)]
    figure = Figure(figsize=(15, 3.9 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(SPENT), squeeze=False, sharey="row")
    for row, task in zip(panels, tasks):
        measure = study.tasks[task].measure
        for axes, spent in zip(row, SPENT):
            for number, (arm, runs) in enumerate(by_arm(study, records, task).items()):
                color, style = f"C{number % 10}", "-" if number < 10 else "--"
                for run in runs.values() if len(runs) > 1 else ():
                    curve = [[record[key] for record in run] for key in (spent, f"eval/{measure}")]
                    axes.plot(*curve, color=color, linestyle=style, linewidth=0.6, alpha=0.5)
                mean = [seeds_mean(runs, key) for key in (spent, f"eval/{measure}")]
                axes.plot(*mean, color=color, linestyle=style, linewidth=2, label=f"{arm} ({len(runs)})")
            axes.set_xlabel({"pflop": "PFLOP"}.get(spent, spent))
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{task}: {measure}, held out")
        row[-1].legend(fontsize="small", title="arm (seeds)", loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _save_svg(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure: no date, and ids that are not drawn at random."""
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": "crd-fast"}):
        figure.savefig(path, metadata={"Date": None})
