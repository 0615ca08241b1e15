"""What a run took so far: hours, operations and memory, by phase."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from crd_fast.run.progress import duration
from crd_fast.run.report.run import Run, number, series

# the seconds of each phase in metrics.jsonl, how it is called, and the phase of its memory
PHASES = (
    ("seconds_rollout", "Rollout", "rollout"),
    ("seconds_reward", "Rewards, after the rollout", "rewards"),
    ("seconds_update", "Update", "update"),
    ("seconds_eval", "Evaluations", "evaluation"),
    ("seconds_guided_base", "Base with guidance", "guided_base"),
)


@dataclass(frozen=True)
class Spent:
    """What one phase took over the whole run. gpu_bytes: the peak of tensors, NaN if it is not known."""

    name: str
    seconds: float
    share: float
    gpu_bytes: float


def phases(run: Run) -> list[Spent]:
    """The phases that took time."""
    seconds = {key: _total(run, key) for key, _, _ in PHASES}
    total = sum(seconds.values())
    return [
        Spent(name, seconds[key], seconds[key] / total, _most(run, f"gpu_peak_bytes/{phase}"))
        for key, name, phase in PHASES
        if seconds[key]
    ]


def spent(run: Run) -> list[tuple[str, str]]:
    """Whole run: time, what is left of it, speed, operations and memory, as far as they are known."""
    found, rows = [], run.trained
    seconds = seconds_of(run)
    if seconds:
        found.append(("time", duration(seconds)))
    each = [sum(number(row, key) for key, _, _ in PHASES[:3]) for row in rows]
    each = [value for value in each if math.isfinite(value)]
    if each:
        found.append(("an iteration", f"{duration(statistics.median(each))} (median)"))
    done = run.metrics[-1]["iteration"] if run.metrics else 0
    if run.planned and 0 < done < run.planned:
        left = (run.planned - done) * seconds / done
        found.append(("left, at this pace", duration(left)))
    speed = [value for value in series(rows, "images_per_second") if math.isfinite(value)]
    if speed:
        found.append(("training pictures a second", f"{statistics.median(speed):.3g} (median)"))
    found += _operations(run)
    for key, name in (("gpu_peak_bytes", "GPU memory, at most"), ("peak_rss_bytes", "host memory, at most")):
        size = _most(run, key)
        if math.isfinite(size):
            found.append((name, f"{size / 2**30:.1f} GiB"))
    return found


def seconds_of(run: Run) -> float:
    return sum(_total(run, key) for key, _, _ in PHASES)


def _operations(run: Run) -> list[tuple[str, str]]:
    """PFLOP of rollout and update, and how fast they were: known where a plan counts them."""
    known = [row for row in run.trained if math.isfinite(number(row, "tflops"))]
    seconds = [number(row, "seconds_rollout") + number(row, "seconds_update") for row in known]
    tflop = sum(number(row, "tflops") * taken for row, taken in zip(known, seconds))
    if not known or not tflop > 0:
        return []
    achieved = f"{tflop / sum(seconds):.3g} TFLOP/s"
    return [("rollout and update", f"{tflop / 1e3:.3g} PFLOP"), ("achieved", achieved)]


def _total(run: Run, key: str) -> float:
    return sum(value for value in series(run.metrics, key) if math.isfinite(value))


def _most(run: Run, key: str) -> float:
    return max((value for value in series(run.metrics, key) if math.isfinite(value)), default=math.nan)
