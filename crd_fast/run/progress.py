"""What a person sees while a run goes: bars for the phases, reward and KL so far, the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
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

from crd_fast.run.metrics import EVALUATED_ALIKE, GPU_PEAK, GUIDED_BASE, comparable, value_of
from crd_fast.run.observer import Observer
from crd_fast.run.scores import guided_base_scores, scores_of, shown, shown_change


class Bars(Observer):
    """Rich progress bars; plain lines where the output is no terminal."""

    def __init__(self, console: Console, iterations: int):
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:<11}", markup=False),
            BarColumn(bar_width=max(6, min(28, console.width - 74))),  # with the note it fits into 80
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

    def evaluated(self, record: dict) -> None:
        """Prints the evaluation of iteration 0; later ones are printed with their iteration."""
        if record["iteration"]:
            return
        self._say(f"before training, {record.get('eval/images', '?')} images: {said_of(record, 'eval/')}")
        scale = record.get(f"{GUIDED_BASE}guidance_scale")
        if scale is not None:
            self._say(f"the base with guidance {scale:g}: {said_of(record, GUIDED_BASE)}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def iteration_done(self, record: dict) -> None:
        note = f"reward {record['reward_mean']:.3f}"
        if "kl" in record:  # not where all optimizer steps were left out
            note += f"  KL {record['kl']:.4f}"
        self._bars.update(self._run, completed=record["iteration"], note=note)
        seconds = sum(record[name] for name in ("seconds_rollout", "seconds_reward", "seconds_update"))
        self._seconds.append(seconds + record.get("seconds_eval", 0.0))
        left = (self._iterations - record["iteration"]) * sum(self._seconds) / len(self._seconds)
        evaluated = said_of(record, "eval/")
        memory = f"  GPU {record[GPU_PEAK] / 2**30:.1f} GB" if GPU_PEAK in record else ""
        if evaluated or not self.console.is_terminal:
            self._say(
                f"iteration {record['iteration']:>4}/{self._iterations}  {note}{memory}  {seconds:.1f} s"
                f"{evaluated and f'  {evaluated}'}  left {duration(left)}"
            )


def said_of(record: dict, prefix: str) -> str:
    """What an evaluation found in short, "" where there was none. prefix: eval/ or guided_base/."""
    if f"{prefix}overall" in record:
        clean = f" clean {record[f'{prefix}clean']:.3f}" if f"{prefix}clean" in record else ""
        return f"held-out {record[f'{prefix}overall']:.3f}{clean}"
    if f"{prefix}reward_mean" in record:
        return f"held-out reward {record[f'{prefix}reward_mean']:.3f}"
    return ""


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
    """The last evaluation of a run beside the first that was made as it was; None if there are not two.

    Changes have their standard error, paired picture by picture, where `run` has the pictures' scores. Beside
    them the base with guidance, where it was evaluated, and what the last evaluation differs from it by.
    """
    evaluated = [record for record in records if any(key.startswith("eval/") for key in record)]
    evaluated = comparable(evaluated, EVALUATED_ALIKE)
    if len(evaluated) < 2:
        return None
    first, last = evaluated[0], evaluated[-1]
    start, end = (scores_of(run, record["iteration"]) for record in (first, last))
    guided, scale = guided_base_scores(run), first.get(f"{GUIDED_BASE}guidance_scale")
    shared, _ = (end.trained_on() if end else None) or (0, 0)
    which = f"iterations {first['iteration']} and {last['iteration']}"
    title = f"Held-out prompts, {first.get('eval/images', '?')} images, {which}"
    if shared:
        title = f"{title.replace('Held-out', 'Evaluated')}; {shared} of the prompts are trained on as well"
    keys = [key for key in {**first, **last} if key.startswith("eval/") and key != "eval/images"]
    names = [key.removeprefix("eval/") for key in keys]
    names.sort(key=lambda name: ("reward" in name, name in ("overall", "clean")))
    heads = ["before", "after", "change"]
    caption = "± one standard error, prompts as the units; * p < 0.05, paired"
    if scale is not None:
        heads += ["guided\nbase", "against it"]
        caption += f"; guided base: the base with guidance scale {scale:g}"
    # no lines between: they would take the room of names, which are folded where they find none
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", style="bold", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    for name in names:
        before, after = (value_of(record, f"eval/{name}") for record in (first, last))
        row = [shown(before), shown(after), shown_change((before, after), start, end, name)]
        if (known := first.get(GUIDED_BASE + name)) is not None:
            row += [shown(known), shown_change((known, after), guided, end, name)]
        table.add_row(name, *row)
    return table
