"""What a run leaves in its folder while it goes: recipe, environment, metrics, warnings, TensorBoard."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import shutil
from pathlib import Path

import numpy as np

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.reward_weights import trained_weights
from crd_fast.run.hacking import planned_evaluations
from crd_fast.run.machine import environment
from crd_fast.run.metrics import METRICS, read_metrics
from crd_fast.run.new_files import naming, write_atomically
from crd_fast.run.trackers import open_trackers
from crd_fast.run.watch import Watch

RECIPE, ENVIRONMENT = "config.yaml", "environment.json"
# what a run and its report write
FILES = (
    *(METRICS, RECIPE, ENVIRONMENT, "checkpoints", "samples", "evaluations", "tensorboard", "warnings.txt"),
    *("report.html", "rollout.safetensors", "flops.jsonl"),
)
SMALLEST_SPACE = 2**27  # bytes without which no run begins; a plan knows how many its checkpoints take

logger = logging.getLogger("crd_fast")


class RunLog:
    """The files of one run.

    resume_at: the iteration that is logged next where a run is resumed; the metrics of earlier ones are kept.
    A run that had trained and resumes at 0 starts over: its metrics get another name. None: a new run.
    Raises UserError if a new run's folder already holds one.
    """

    def __init__(self, output: Path, recipe: Recipe, resume_at: int | None = None):
        if resume_at is None:
            refuse_existing(output)
        output.mkdir(parents=True, exist_ok=True)
        self._metrics = output / METRICS
        if resume_at is not None:
            records = read_metrics(output)
            if resume_at == 0 and records and records[-1]["iteration"] > 0:
                names = (output / f"{METRICS}.{count}" for count in itertools.count(1))
                aside = next(path for path in names if not path.exists())
                self._metrics.replace(aside)
                logger.warning("warning: no checkpoint yet: starting over; its metrics are now %s", aside)
            kept = (record for record in records if record["iteration"] < resume_at)
            write_atomically(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))
        write_atomically(output / RECIPE, recipe.to_yaml())
        write_atomically(output / ENVIRONMENT, json.dumps(environment(), indent=1))
        self._watch = Watch(
            output,
            recipe.rollout.prompts_per_iteration,
            recipe.rollout.samples_per_prompt,
            trained_weights(recipe.rewards),
            read_metrics(output),
            planned_evaluations(recipe.train.iterations, recipe.evaluate.every),
        )
        self._trackers = open_trackers(recipe.train.trackers, output, recipe.model_dump(), resume_at)

    def write(self, record: dict, grid: np.ndarray | None = None) -> None:
        """A line of the metrics, and the warnings that it gives rise to."""
        with naming(self._metrics), open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        values = {name: value for name, value in record.items() if name != "iteration"}
        self._trackers.log(values, record["iteration"], grid)
        self._watch.see(record)

    def close(self) -> None:
        self._trackers.close()


def refuse_existing(output: Path) -> None:
    """Raises UserError if the folder already holds a run, or a file that one would write over."""
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output {output}: expected a folder, got a file")
    for name in FILES:
        if os.path.lexists(output / name):
            if name in (METRICS, RECIPE, "checkpoints"):
                raise UserError(
                    f"--output {output}: already holds a run; choose another folder, or go on with it: "
                    f"crd-fast train --resume {shlex.quote(str(output))}"
                )
            raise UserError(f"--output {output}: {name} is there already; choose another folder")


def refuse_full(output: Path, needed: float) -> None:
    """Raises UserError where the disk of a folder that may not be there yet has fewer bytes free."""
    folder = output.absolute()
    while not os.path.exists(folder) and folder != folder.parent:  # a Path raises where its name is too long
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # writing will say what is the matter
    if free < needed:
        wanted, found = (f"{count / 2**30:.2f} GB" for count in (needed, free))
        raise UserError(f"--output {output}: expected {wanted} free on its disk for checkpoints, got {found}")
