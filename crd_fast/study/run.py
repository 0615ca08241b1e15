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
from crd_fast.run.row_counts import RowCounts, flops_of
from crd_fast.study.study import Cell, Study, cells
from crd_fast.train.changes import differences
from crd_fast.train.trainer import Trainer

FLOPS = "flops.jsonl"  # of each iteration, in a run's folder
# sections and keys that change no weights
LOOKS_ON = {"evaluate", "eval_rewards", "checkpoint"}
LOOKS_ON |= {"train.trackers", "train.profile", "model.prompt_cache", "model.prompt_cache_gb"}


def run_study(study: Study, output: Path, wanted: Callable[[Cell], bool], say: Callable[[str], None]) -> bool:
    """Every run that is wanted and not whole. False where Ctrl-C ended one, which goes on the next time."""
    chosen = [cell for cell in cells(study) if wanted(cell)]
    for number, cell in enumerate(chosen, start=1):
        folder = output / cell.folder
        if other := other_settings(folder, cell):
            raise UserError(
                f"{folder}: made with other settings: {other}; move it away, or name another --output"
            )
        if is_whole(folder, cell):
            continue
        say(f"run {number} of {len(chosen)}: {cell.folder}")
        if not run_cell(cell, folder):
            return False
    return True


def is_whole(folder: Path, cell: Cell) -> bool:
    records = read_metrics(folder)
    return bool(records) and records[-1]["iteration"] >= cell.recipe.train.iterations


def other_settings(folder: Path, cell: Cell) -> str:
    """How the arm trains now and a run in its folder did not; empty where nothing differs.

    What only looks on is not compared: a study may get a judge, and keep the runs that it has.
    """
    config = folder / RECIPE
    if not config.exists():
        return ""
    before, now = load_recipe(str(config)).model_dump(), cell.recipe.model_dump()
    changed = differences(before, now)
    return "; ".join(text for key, text in changed if not {key, key.partition(".")[0]} & LOOKS_ON)


def run_cell(cell: Cell, folder: Path) -> bool:
    """One run, from its newest checkpoint if it has one. Its checkpoints are removed once it is whole."""
    trainer = Trainer(cell.recipe, folder, resume=folder.exists())
    trainer.observer.add(Ledger(folder / FLOPS, trainer.iteration, Planner(cell.recipe).plan().row_flops))
    if not trainer.run():
        return False
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


class Ledger(RowCounts):
    """Writes down what each iteration computed, before a checkpoint may be made of it."""

    def __init__(self, path: Path, iteration: int, row_flops: Mapping[str, float]):
        super().__init__()
        self.path, self.iteration, self.row_flops = path, iteration, row_flops

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        if name != "iteration":
            yield
            return
        self.rows.clear()
        yield
        self.iteration += 1
        line = {"iteration": self.iteration, "flops": flops_of(self.rows, self.row_flops)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
