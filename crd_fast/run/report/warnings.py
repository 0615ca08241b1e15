"""What a careful reader would want to be told before believing the headline."""

from __future__ import annotations

import math
import statistics

from crd_fast.run.hacking import said_of
from crd_fast.run.metrics import TRAINED_ALIKE, comparable
from crd_fast.run.report.held_out import (
    NOT_CATEGORIES,
    Change,
    exploited,
    trained_on,
)
from crd_fast.run.report.run import Run, number, series
from crd_fast.run.report.words import label, sentence


def warnings(run: Run, found: list[Change]) -> list[str]:
    """Sentences, the most general first."""
    said = list(run.problems)
    if run.planned and run.metrics and run.metrics[-1]["iteration"] < run.planned:
        said.append(f"This run has done {run.metrics[-1]['iteration']} of {run.planned} iterations.")
    shared = trained_on(run)
    if shared:
        said.append(
            f"{shared} of the evaluated prompts {'is' if shared == 1 else 'are'} among those for training: "
            "what is said of them does not show what the model does with others."
        )
    if run.left_out:
        said.append(
            f"From iteration {run.evaluated[0]['iteration']} on the run was evaluated otherwise (other "
            "prompts, guidance, steps or judges): its earlier evaluations are left out."
        )
    said += _warned(run)
    categories = [change for change in found if change.name not in NOT_CATEGORIES]
    for change in categories:
        if change.fell(among=len(categories)):
            said.append(f"{label(change.name)} fell by {_size(change)}.")
    return said + _training_warnings(run, found)


def _size(change: Change) -> str:
    return f"{abs(change.difference):.{change.digits}f}"


def _warned(run: Run) -> list[str]:
    """While it ran, and of hacking also where the run's file of warnings has nothing of it."""
    fallen = exploited(run)
    alarm = [said_of(fallen)] if fallen else []
    said = [sentence(line) for line in [*run.warned, *(line for line in alarm if line not in run.warned)]]
    if any(fall.judge == "clean" for fall in fallen):
        said.append("Clean correctness fell: look for extra objects in the samples.")
    return said


def _training_warnings(run: Run, found: list[Change]) -> list[str]:
    said, rows = [], comparable(run.trained, TRAINED_ALIKE)
    if len(run.evaluated) > 1 and found and len(rows) >= 10:
        main, fifth, rewards = found[0], len(rows) // 5, series(rows, "reward_mean")
        gain = statistics.fmean(rewards[-fifth:]) - statistics.fmean(rewards[:fifth])
        held = main.direction in ("same", "down") or (main.direction == "unknown" and main.difference <= 0)
        if gain > 0.05 and held:
            said.append(
                f"The training reward rose by {gain:.2f} but the held-out result did not: overfitting."
            )
    for key in ("reward_mean", "policy_loss", "kl_loss", "grad_norm"):
        bad = [row["iteration"] for row in rows if key in row and not math.isfinite(number(row, key))]
        if bad:
            said.append(f"{label(key)} is not a finite number at iteration {bad[0]}.")
    return said
