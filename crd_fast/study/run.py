"""Running a study: each of its runs by the trainer, whole ones left alone, interrupted ones resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.plan.planner import Planner
from crd_fast.run.log import RECIPE
from crd_fast.run.metrics import read_metrics
from crd_fast.run.new_files import write_atomically
from crd_fast.run.row_counts import RowCounts, flops_of
from crd_fast.study.study import Cell, Study, cells
from crd_fast.train.changes import differences
from crd_fast.train.checkpoints import ADDED, BESIDE, SCORE
from crd_fast.train.places import absolute
from crd_fast.train.trainer import Trainer

FLOPS = "flops.jsonl"  # of each iteration, in a run's folder
# sections and keys that change neither the weights nor the pictures that they are judged by
LOOKS_ON = {"eval_rewards", "checkpoint"}
LOOKS_ON |= {f"evaluate.{name}" for name in BESIDE | ADDED}
LOOKS_ON |= {"train.trackers", "train.profile", "model.prompt_cache", "model.prompt_cache_gb"}


def runs_left(study: Study, output: Path, wanted: Callable[[Cell], bool]) -> list[Cell]:
    """Those that are wanted and not whole. Raises UserError where one was begun with other settings."""
    chosen = [cell for cell in cells(study) if wanted(cell)]
    for cell in chosen:
        if other := other_settings(output / cell.folder, cell):
            raise UserError(
                f"{output / cell.folder}: made with other settings: {other}; "
                "move it away, or name another --output"
            )
    return [cell for cell in chosen if not is_whole(output / cell.folder, cell)]


def run_in_turn(output: Path, left: list[Cell], say: Callable[[str], None]) -> bool:
    """Every run, one after the other. False where Ctrl-C left some, for the next time."""
    for number, cell in enumerate(left, start=1):
        say(f"run {number} of {len(left)}: {cell.folder}")
        if not run_cell(cell, output / cell.folder):
            return all(is_whole(output / each.folder, each) for each in left)
    return True


def is_whole(folder: Path, cell: Cell) -> bool:
    """Whether its last iteration is there, and evaluated: a run may be stopped between the two."""
    records = read_metrics(folder)
    if not records or records[-1]["iteration"] < cell.recipe.train.iterations:
        return False
    return SCORE in records[-1] or not cell.recipe.evaluate.every


def other_settings(folder: Path, cell: Cell) -> str:
    """How the arm trains and is evaluated now and a run in its folder was not; empty where nothing differs.

    What only looks on is not compared: a study may get a judge, and keep the runs that it has.
    """
    config = folder / RECIPE
    if not config.exists():
        return ""
    # a run's own recipe has absolute paths
    before, now = load_recipe(str(config)).model_dump(), absolute(cell.recipe).model_dump()
    changed = differences(before, now)
    return "; ".join(text for key, text in changed if not {key, key.partition(".")[0]} & LOOKS_ON)


def run_cell(cell: Cell, folder: Path) -> bool:
    """One run, from its newest checkpoint if it has one. Its checkpoints are removed once it is whole.

    False where it was asked to stop, also where that was in its last iteration, which ends first.
    """
    trainer = Trainer(cell.recipe, folder, resume=folder.exists())
    plan, partial = Planner(cell.recipe).plan(), trainer.rollout.partial
    trainer.observer.add(
        Ledger(
            folder / FLOPS,
            trainer.iteration,
            plan.row_flops,
            lambda: plan.rows["sampler"] if partial.taken else None,
        )
    )
    if not trainer.run():
        return False
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return not trainer.stopping.requested


class Ledger(RowCounts):
    """Writes down what each iteration computed, before a checkpoint may be made of it.

    rollout: rows of an iteration's rollout where a part of it was made before the run was stopped, and is not
    made again; None where all was counted.
    """

    def __init__(
        self,
        path: Path,
        iteration: int,
        row_flops: Mapping[str, float],
        rollout: Callable[[], float | None] = lambda: None,
    ):
        super().__init__()
        self.path, self.iteration, self.row_flops, self.rollout = path, iteration, row_flops, rollout
        if path.exists():  # a line that was cut off would take the next one with it
            known = flops_by_iteration(path)
            write_atomically(path, "".join(_line(i, of) for i, of in known.items() if i <= iteration))

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        if name != "iteration":
            yield
            return
        self.rows.clear()
        yield
        self.iteration += 1
        rows = self.rollout()
        counted = self.rows if rows is None else {**self.rows, ("sampler", False): rows}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(self.iteration, flops_of(counted, self.row_flops)))


def _line(iteration: int, flops: float) -> str:
    return json.dumps({"iteration": iteration, "flops": flops}) + "\n"


def flops_by_iteration(path: Path) -> dict[int, float]:
    """What a `Ledger` wrote, {} where none did; of two lines of one iteration, which ran again, the later
    counts."""
    found: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            found[int(values["iteration"])] = float(values["flops"])
        except (ValueError, TypeError, KeyError):  # cut off by a kill; the iteration ran again
            continue
    return found
