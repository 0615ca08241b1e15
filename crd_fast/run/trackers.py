"""Where a run's metrics go besides metrics.jsonl: TensorBoard, and what accelerate has trackers for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crd_fast.errors import UserError, did_you_mean, reason_of

TENSORBOARD = "tensorboard"

logger = logging.getLogger("crd_fast")


def check_trackers(names: list[str]) -> None:
    """Raises UserError for a name that accelerate has no tracker of, or whose package is not installed."""
    if set(names) <= {TENSORBOARD}:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in set(names) - {TENSORBOARD}:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS) or f"; known: {', '.join(LOGGER_TYPE_TO_CLASS)}"
            raise UserError(f"train.trackers: unknown tracker {name!r}{hint}")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"train.trackers: {name} is not installed: pip install {name.replace('_', '-')}")


class TensorBoard:
    """Events in `folder`. resume_at: as of `RunLog`; events from that iteration on are dropped."""

    def __init__(self, folder: Path, resume_at: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(folder), purge_step=resume_at)

    def log(self, values: dict[str, float], iteration: int, grid: np.ndarray | None) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)
        if grid is not None:
            self._events.add_image("samples", grid, iteration, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Tracked:
    """One of accelerate's trackers, of the project `crd-fast`."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        if name == "wandb":  # else its files would be in the folder that the command is called from
            where = {"dir": str(folder), "name": folder.name}
        self._tracker = kind("crd-fast", **where)
        self._tracker.start()
        self._tracker.store_init_configuration(settings)

    def log(self, values: dict[str, float], iteration: int, grid: np.ndarray | None) -> None:
        self._tracker.log(values, step=iteration)
        if grid is not None and hasattr(self._tracker, "log_images"):
            self._tracker.log_images({"samples": grid[None]}, step=iteration)

    def close(self) -> None:
        self._tracker.finish()


class Trackers:
    """The trackers of a run. If one fails, a warning says so, once until it works again; the run goes on.

    What it missed stands in metrics.jsonl. Its server may be away for a minute of a night.
    """

    def __init__(self, of: dict[str, TensorBoard | Tracked]):
        self._of, self._failing = of, set[str]()

    def log(self, values: dict[str, float], iteration: int, grid: np.ndarray | None) -> None:
        for name, tracker in self._of.items():
            self._try(name, tracker.log, values, iteration, grid)

    def close(self) -> None:
        for name, tracker in self._of.items():
            self._try(name, tracker.close)

    def _try(self, name: str, do: Callable[..., None], *arguments: Any) -> None:
        try:
            do(*arguments)
        except Exception as error:  # whatever somebody's package raises
            if name not in self._failing:
                logger.warning("warning: tracker %s: %s", name, reason_of(error))
            self._failing.add(name)
        else:
            self._failing.discard(name)


def open_trackers(
    names: list[str], output: Path, settings: dict[str, Any], resume_at: int | None
) -> Trackers:
    """The trackers named. settings: the recipe, as plain values; resume_at: as of `RunLog`."""
    check_trackers(names)
    return Trackers(
        {
            name: TensorBoard(output / TENSORBOARD, resume_at)
            if name == TENSORBOARD
            else Tracked(name, output, settings)
            for name in names
        }
    )
