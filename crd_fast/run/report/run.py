"""What a run's folder holds, read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crd_fast.errors import UserError
from crd_fast.run.metrics import EVALUATED_ALIKE, METRICS, comparable, read_metrics
from crd_fast.run.scores import Scores, guided_base_scores, read_scores, scores_path
from crd_fast.run.watch import WARNINGS
from crd_fast.yaml_files import read_yaml

PHASES = ("rollout", "reward", "update")


@dataclass
class Run:
    """A run's folder, read.

    scores: of each evaluation's pictures, by iteration, as far as they are there; guided_base: of the base
    with guidance. warned: what was warned of
    while it ran. problems: sentences about what could not be read.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one an iteration, iteration 0 included
    environment: dict[str, Any] = field(default_factory=dict)
    scores: dict[int, Scores] = field(default_factory=dict)
    guided_base: Scores | None = None
    warned: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The iterations that updated the policy: not iteration 0, which is only evaluated."""
        return [row for row in self.metrics if "reward_mean" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if any(key.startswith("eval/") for key in row)]

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The evaluations that can be compared with the last one."""
        return comparable(self.evaluations, EVALUATED_ALIKE)

    @property
    def left_out(self) -> set[int]:
        """Iterations of the evaluations that cannot."""
        return {row["iteration"] for row in self.evaluations} - {row["iteration"] for row in self.evaluated}

    def grids(self) -> list[tuple[int, Path]]:
        """The pictures of evaluations that can be compared: iteration and file, by iteration."""
        there = (path for path in (self.folder / "samples").glob("[0-9]*.png") if path.stem.isdecimal())
        known = {row["iteration"] for row in self.evaluated}
        return sorted((int(path.stem), path) for path in there if int(path.stem) in known)

    @property
    def starts_from_lora(self) -> bool:
        """Whether iteration 0 is something else than the base."""
        return bool((self.config.get("model") or {}).get("init_lora"))

    @property
    def planned(self) -> int | None:
        """Iterations the recipe asks for."""
        iterations = (self.config.get("train") or {}).get("iterations")
        return iterations if isinstance(iterations, int) else None


def read_run(folder: Path) -> Run:
    """Reads what a run has left, all but its pictures. Raises UserError if `folder` is no run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: expected the folder of a run, found no config.yaml in it")
    config = read_yaml(folder / "config.yaml")
    left_out: list[int] = []
    run = Run(folder, config, read_metrics(folder, left_out), guided_base=guided_base_scores(folder))
    run.problems += [f"Line {n} of {METRICS} is incomplete and was left out." for n in left_out]
    if (folder / "environment.json").is_file():
        environment = read_json(folder / "environment.json", run)
        run.environment = environment if isinstance(environment, dict) else {}
    if (folder / WARNINGS).is_file():
        run.warned = (folder / WARNINGS).read_text(encoding="utf-8", errors="replace").split("\n")
        run.warned = [line for line in run.warned if line.strip()]
    for iteration in (row["iteration"] for row in run.evaluations):
        path = scores_path(folder, iteration)
        try:
            run.scores[iteration] = read_scores(path)
        except (UserError, OSError):
            run.problems.append(f"{path.relative_to(folder)} could not be read: errors are not known.")
    return run


def read_json(path: Path, run: Run) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        run.problems.append(f"{path.relative_to(run.folder)} could not be read.")
        return None


def series(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [number(row, key) for row in rows]


def number(row: dict[str, Any], key: str) -> float:
    """row[key] as a float; NaN where it is missing or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan
