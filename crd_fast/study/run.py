"""Running a study: each of its runs by the trainer, whole ones left alone, interrupted ones resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from crd_fast.plan.forwards import Flops
from crd_fast.run.metrics import read_metrics
from crd_fast.run.rows import RowCounts
from crd_fast.seeds import seeded_noise
from crd_fast.study.study import Cell, Study, cells
from crd_fast.train.forwards import autocast
from crd_fast.train.trainer import Trainer

FLOPS = "flops.jsonl"  # of each iteration, in a run's folder


def run_study(study: Study, output: Path, wanted: Callable[[Cell], bool], say: Callable[[str], None]) -> bool:
    """Every run that is wanted and not whole. False where Ctrl-C ended one, which goes on the next time."""
    chosen = [cell for cell in cells(study) if wanted(cell)]
    for number, cell in enumerate(chosen, start=1):
        folder = output / cell.folder
        if is_whole(folder, cell):
            continue
        say(f"run {number} of {len(chosen)}: {cell.folder}")
        if not run_cell(cell, folder):
            return False
    return True


def is_whole(folder: Path, cell: Cell) -> bool:
    records = read_metrics(folder)
    return bool(records) and records[-1]["iteration"] >= cell.recipe.train.iterations


def run_cell(cell: Cell, folder: Path) -> bool:
    """One run, from its newest checkpoint if it has one. Its checkpoints are removed once it is whole."""
    trainer = Trainer(cell.recipe, folder, resume=folder.exists())
    trainer.observer.add(Ledger(folder / FLOPS, trainer.iteration, row_flops(trainer)))
    if not trainer.run():
        return False
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return True


class Ledger(RowCounts):
    """Writes down what each iteration computed, before a checkpoint may be made of it."""

    def __init__(self, path: Path, iteration: int, of_row: dict[bool, int]):
        super().__init__()
        self.path, self.iteration, self.of_row = path, iteration, of_row

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        with super().phase(name, total):
            yield
        if name == "iteration":
            self.iteration += 1
            flops = sum(rows * self.of_row[gradient] for (_, gradient), rows in self.rows.items())
            self.rows.clear()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": self.iteration, "flops": flops}) + "\n")


def row_flops(trainer: Trainer) -> dict[bool, int]:
    """Floating point operations of one row of a forward: False, without gradient, True, with its backward."""
    model, rollout = trainer.model, trainer.recipe.rollout
    x = seeded_noise(torch.zeros(1, dtype=torch.int64), model.latent_shape(rollout.resolution), model.device)
    sigma = torch.full((1,), 0.5, device=x.device)
    found = {}
    for gradient in (False, True):
        with (
            Flops() as counter,
            torch.set_grad_enabled(gradient),
            autocast(x.device.type, trainer.recipe.train.precision),
        ):
            velocity = model.velocity(x, sigma, trainer.empty)
            if gradient:
                velocity.sum().backward()
        found[gradient] = counter.total
    for parameter in trainer.weights.trained():
        parameter.grad = None
    return found
