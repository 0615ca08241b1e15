"""What a person sees while a run goes: bars for the phases, reward and KL so far, the time left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from crd_fast.run.metrics import GPU_PEAK, GUIDED_BASE
from crd_fast.run.observer import Observer
from crd_fast.run.scores import Scores, compare_metric, guided_base_scores, scores_of


class Bars(Observer):
    """Rich progress bars; plain lines where the output is no terminal."""

    def __init__(self, console: Console, iterations: int):
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:<11}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._run = self._bars.add_task("iterations", total=iterations, note="")
        self._phase = self._bars.add_task("", total=None, note="", visible=False)
        self._iterations = iterations
        self._seconds: list[float] = []  # of each iteration, with its evaluation

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def begin(self, done: int) -> None:
        """The run goes on after so many iterations."""
        self._bars.update(self._run, completed=done)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        if total is None:
            yield
            return
        if name == "encoding" and not self.console.is_terminal:  # it may take long before the first line
            self.console.print(f"encoding {total} prompts", highlight=False)
        self._bars.reset(self._phase, total=total, description=name, visible=True)
        yield
        self._bars.update(self._phase, visible=False)

    def advance(self, count: int) -> None:
        self._bars.advance(self._phase, count)

    def iteration_done(self, record: dict) -> None:
        note = f"reward {record['reward_mean']:.3f}"
        if "kl" in record:  # not where all optimizer steps were left out
            note += f"  KL {record['kl']:.4f}"
        if GPU_PEAK in record:
            note += f"  GPU {record[GPU_PEAK] / 2**30:.1f} GB"
        self._bars.update(self._run, completed=record["iteration"], note=note)
        seconds = sum(record[name] for name in ("seconds_rollout", "seconds_reward", "seconds_update"))
        self._seconds.append(seconds + record.get("seconds_eval", 0.0))
        left = (self._iterations - record["iteration"]) * sum(self._seconds) / len(self._seconds)
        evaluated = ""
        if "eval/overall" in record:
            evaluated = f"  held-out {record['eval/overall']:.3f} clean {record['eval/clean']:.3f}"
        elif "eval/reward_mean" in record:
            evaluated = f"  held-out reward {record['eval/reward_mean']:.3f}"
        if evaluated or not self.console.is_terminal:
            self.console.print(
                f"iteration {record['iteration']:>4}/{self._iterations}  {note}  {seconds:.1f} s{evaluated}"
                f"  left {duration(left)}",
                highlight=False,
                soft_wrap=True,
            )


def gpu_memory(records: list[dict]) -> str | None:
    """The most that tensors had on the GPU, by phase; None where there was none."""
    sizes: dict[str, float] = {}
    for record in records:
        for key in (key for key in record if key.startswith(f"{GPU_PEAK}/")):
            name = key.partition("/")[2].replace("_", " ")
            sizes[name] = max(record[key], sizes.get(name, 0))
    parts = [f"{name} {size / 2**30:.1f} GB" for name, size in sizes.items()]
    return f"GPU memory, at most: {', '.join(parts)}" if parts else None


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    for size, unit, limit in ((1, "s", 120), (60, "min", 120), (3600, "h", 48)):
        if seconds < size * limit:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds / 3600:.0f} h ({seconds / 86400:.0f} days)"


def before_and_after(run: Path, records: list[dict]) -> Table | None:
    """The first and the last evaluation of a run side by side; None if there are not two.

    Changes have their standard error, paired picture by picture, where `run` has the pictures' scores. Beside
    them the base with guidance, where it was evaluated, and what the last evaluation differs from it by.
    """
    evaluated = [record for record in records if any(key.startswith("eval/") for key in record)]
    if len(evaluated) < 2:
        return None
    first, last = evaluated[0], evaluated[-1]
    start, end = (scores_of(run, record["iteration"]) for record in (first, last))
    shared, _ = (end.trained_on() if end else None) or (0, 0)
    images = f"{first.get('eval/images', '?')} images"
    title = f"Held-out prompts, {images}"
    if shared:
        title = f"Evaluated prompts, {images}; {shared} of the prompts are trained on as well"
    table = Table(title=title)
    table.add_column("", style="bold", overflow="fold")
    heads = [f"iteration {first['iteration']}", f"iteration {last['iteration']}", "change"]
    guided = guided_base_scores(run)
    scale = first.get(f"{GUIDED_BASE}guidance_scale")
    if scale is not None:
        heads += [f"base, guidance {scale:g}", "against it"]
    for title in heads:
        table.add_column(title, justify="right")
    names = [key.removeprefix("eval/") for key in first if key.startswith("eval/") and key != "eval/images"]
    for name in sorted(names, key=lambda name: ("reward" in name, name in ("overall", "clean"))):
        before, after = first[f"eval/{name}"], last.get(f"eval/{name}", float("nan"))
        cells = [f"{before:.3f}", f"{after:.3f}", _change(before, after, start, end, name)]
        base = first.get(GUIDED_BASE + name)
        if base is not None:
            cells += [f"{base:.3f}", _change(base, after, guided, end, name)]
        table.add_row(name, *cells)
    table.caption = "± one standard error, prompts as the units; * p < 0.05, paired"
    return table


def _change(before: float, after: float, start: Scores | None, end: Scores | None, name: str) -> str:
    both = compare_metric(start, end, name)
    if both is None or math.isnan(both.error):
        return f"{after - before:+.3f}"
    return f"{after - before:+.3f} ± {both.error:.3f}{'*' if both.significant else ' '}"
