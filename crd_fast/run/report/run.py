"""What a run's folder holds, read, and what its evaluations say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from crd_fast.errors import UserError
from crd_fast.run.metrics import METRICS, read_metrics
from crd_fast.run.report.words import counted, label, signed

NOT_CATEGORIES = ("overall", "clean", "reward_mean", "reward_std", "images")
PHASES = ("rollout", "reward", "update")


@dataclass
class Run:
    """A run's folder, read. `problems` are sentences about what could not be read."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one an iteration, iteration 0 included
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The iterations that updated the policy: not iteration 0, which is only evaluated."""
        return [row for row in self.metrics if "reward_mean" in row]

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if any(key.startswith("eval/") for key in row)]

    @property
    def planned(self) -> int | None:
        """Iterations the recipe asks for."""
        iterations = (self.config.get("train") or {}).get("iterations")
        return iterations if isinstance(iterations, int) else None


def read_run(folder: Path) -> Run:
    """Reads config.yaml, metrics.jsonl and environment.json. Raises UserError if `folder` is no run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: expected the folder of a run, found no config.yaml in it")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'config.yaml'}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'}: expected sections of settings, got {config!r}")
    left_out: list[int] = []
    run = Run(folder, config, read_metrics(folder, left_out))
    run.problems += [f"Line {n} of {METRICS} is incomplete and was left out." for n in left_out]
    if (folder / "environment.json").is_file():
        environment = read_json(folder / "environment.json", run)
        run.environment = environment if isinstance(environment, dict) else {}
    return run


def read_json(path: Path, run: Run) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        run.problems.append(f"{path.relative_to(run.folder)} could not be read.")
        return None


# --- held-out results


@dataclass(frozen=True)
class Change:
    """A held-out quantity at the first and the last evaluation. `error`: standard error of the difference."""

    name: str
    before: float
    after: float
    error: float | None = None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def noise(self) -> float:
        """A difference up to this is not worth a word: two standard errors, 0.03 where they are unknown."""
        return 0.03 if self.error is None else 2 * self.error

    @property
    def plottable(self) -> bool:
        return 0 <= self.before <= 1 and 0 <= self.after <= 1


def series(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [number(row, key) for row in rows]


def number(row: dict[str, Any], key: str) -> float:
    """row[key] as a float; NaN where it is missing or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def standard_error(row: dict[str, Any], key: str, categories: int = 1) -> float | None:
    """Of a share p of n images: sqrt(p (1 - p) / n). None where n is unknown or p is no share.

    categories: how many categories share the evaluated images, for the share of one of them.
    """
    share, images = number(row, f"eval/{key}"), number(row, "eval/images") / categories
    return math.sqrt(share * (1 - share) / images) if 0 <= share <= 1 and images > 0 else None


def changes(run: Run) -> list[Change]:
    """Overall, clean, then every category: those that the first and the last evaluation both have."""
    if not run.evaluated:
        return []
    first, last = run.evaluated[0], run.evaluated[-1]
    names = [key.removeprefix("eval/") for key in last if key.startswith("eval/") and key in first]
    names = [name for name in ("overall", "clean") if name in names] + [
        name for name in names if name not in NOT_CATEGORIES and "/" not in name
    ]
    found = []
    for name in names or ["reward_mean"]:
        before, after = number(first, f"eval/{name}"), number(last, f"eval/{name}")
        if not math.isfinite(before + after):
            continue
        parts = 1 if name in NOT_CATEGORIES else sum(other not in NOT_CATEGORIES for other in names)
        errors = [standard_error(row, name, parts) for row in (first, last)]
        known = [error for error in errors if error is not None]
        error = math.hypot(*known) if len(known) == len(errors) else None
        found.append(Change(name, before, after, error))
    return found


def headline(run: Run, found: list[Change]) -> str:
    """The result in one plain sentence."""
    if not found:
        return _training_headline(run)
    main, first, last = found[0], run.evaluated[0], run.evaluated[-1]
    what = "Held-out correctness" if main.name == "overall" else f"Held-out {label(main.name).lower()}"
    if first is last:
        when = f"after iteration {first['iteration']}" if first["iteration"] else "before training"
        error = standard_error(first, main.name)
        return f"{what} {when} is {main.after:.2f}" + (
            "." if error is None else f", standard error {error:.2f}."
        )
    span = f"from {main.before:.2f} to {main.after:.2f} in {counted(last['iteration'] - first['iteration'])}"
    margin = "" if main.error is None else f", standard error {main.error:.2f}"
    size = f"({signed(main.difference, 2)}{margin})"
    if main.error is not None and abs(main.difference) <= main.noise:
        return f"{what} went {span} {size}, which this evaluation cannot tell from no change."
    return f"{what} {'rose' if main.difference > 0 else 'fell'} {span} {size}."


def _training_headline(run: Run) -> str:
    rewards = [value for value in series(run.trained, "reward_mean") if math.isfinite(value)]
    if not rewards:
        return "No iteration of this run is finished yet."
    end = max(1, len(rewards) // 10)
    first, last = statistics.fmean(rewards[:end]), statistics.fmean(rewards[-end:])
    span = f"went from {first:.2f} to {last:.2f}" if len(rewards) > 1 else f"is {first:.2f}"
    return f"The training reward {span} after {counted(len(rewards))}; held-out prompts were not evaluated."


def warnings(run: Run, found: list[Change]) -> list[str]:
    """What a careful reader would want to be told before believing the headline."""
    by_name = {change.name: change for change in found}
    overall, clean = by_name.get("overall"), by_name.get("clean")
    said = list(run.problems)
    if run.planned and run.metrics and run.metrics[-1]["iteration"] < run.planned:
        said.append(f"This run has done {run.metrics[-1]['iteration']} of {run.planned} iterations.")
    if overall and clean and overall.difference > 0 and clean.difference < -(clean.noise / 2):
        said.append(
            f"Clean correctness fell by {-clean.difference:.2f} while overall correctness rose by "
            f"{overall.difference:.2f}: possible reward hacking. Look for extra objects in the samples."
        )
    for change in found:
        if change.name not in NOT_CATEGORIES and change.difference < -max(0.05, change.noise):
            said.append(f"{label(change.name)} fell by {-change.difference:.2f}.")
    return said + _training_warnings(run, found)


def _training_warnings(run: Run, found: list[Change]) -> list[str]:
    said, rows = [], run.trained
    if len(run.evaluated) > 1 and found and len(rows) >= 10:
        main, fifth, rewards = found[0], len(rows) // 5, series(rows, "reward_mean")
        gain = statistics.fmean(rewards[-fifth:]) - statistics.fmean(rewards[:fifth])
        if gain > 0.05 and main.difference <= 0:
            said.append(
                f"The training reward rose by {gain:.2f} but the held-out result did not: overfitting."
            )
        best = max(run.evaluated, key=lambda row: number(row, f"eval/{main.name}"))
        lost = number(best, f"eval/{main.name}") - main.after
        if lost > main.noise:
            said.append(
                f"The evaluation at iteration {best['iteration']} was {lost:.2f} better than the last."
            )
    flat = sum(value < 1e-6 for value in series(rows, "reward_std"))
    if flat:
        said.append(f"In {flat} of {len(rows)} iterations all samples got the same reward: nothing to learn.")
    limit = (run.config.get("train") or {}).get("max_grad_norm")
    clipped = sum(value > float(limit or math.inf) for value in series(rows, "grad_norm"))
    if clipped > len(rows) / 2:
        said.append(f"The gradient was clipped to {limit} in {clipped} of {len(rows)} iterations.")
    for key in ("reward_mean", "policy_loss", "kl_loss", "grad_norm"):
        bad = [row["iteration"] for row in rows if key in row and not math.isfinite(number(row, key))]
        if bad:
            said.append(f"{label(key)} is not a finite number at iteration {bad[0]}.")
    return said
