"""The page a run leaves behind: `report.html`, one file that needs no network.

It is made from what lies in the run's folder alone, so it can be written for a run that was stopped, that is
still going, or that was copied from another machine.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from crd_fast.errors import UserError
from crd_fast.run.new_files import write_atomically, write_new
from crd_fast.run.observer import Observer
from crd_fast.run.progress import duration
from crd_fast.run.report.advice import advice
from crd_fast.run.report.charts import TEMPLATES, charts
from crd_fast.run.report.held_out import (
    base_note,
    changes,
    guidance_scale,
    headline,
    judged,
    prompts_note,
    trained_on,
)
from crd_fast.run.report.run import Run, read_run
from crd_fast.run.report.samples import samples
from crd_fast.run.report.spent import phases, seconds_of, spent
from crd_fast.run.report.warnings import warnings
from crd_fast.run.report.words import label, signed

logger = logging.getLogger("crd_fast")

OURS = "· crd-fast"  # how the page's title ends


def facts(run: Run) -> list[tuple[str, str]]:
    """Short answers to: how much, how long, where."""
    last = run.metrics[-1]["iteration"] if run.metrics else 0
    planned = f" of {run.planned}" if run.planned and run.planned != last else ""
    found = [("iterations", f"{last}{planned}")]
    rollout = run.config.get("rollout") or {}
    prompts, samples = rollout.get("prompts_per_iteration"), rollout.get("samples_per_prompt")
    if run.trained and isinstance(prompts, int) and isinstance(samples, int):
        found.append(("images trained on", f"{len(run.trained) * prompts * samples:,}"))
    seconds = seconds_of(run)
    if seconds:
        found.append(("time", duration(seconds)))
    device = run.environment.get("gpu") or run.environment.get("cpu")
    if device:
        found.append(("device", str(device)))
    return found


def settings(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of a dotted name and a value as YAML writes it."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += settings(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            rows.append((f"{prefix}{key}", value))
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
            rows.append((f"{prefix}{key}", text.removesuffix("...\n").strip()))
    return rows


def _is_ours(path: Path) -> bool:
    """Whether a page was written here, by its title."""
    try:
        return f"{OURS}</title>" in path.read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return False


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes `run`/report.html, or a new file `out` in its place, and returns its path.

    run: a folder that `crd-fast train` writes: config.yaml, and as far as they are there metrics.jsonl,
    evaluations/, samples/, warnings.txt and environment.json. Raises UserError if the folder is no run, or
    has a report.html that is none of ours, or takes no file; or if something is at `out` already.
    """
    read = read_run(Path(run))
    path = read.folder / "report.html" if out is None else out
    if out is None and os.path.lexists(path) and not _is_ours(path):
        raise UserError(f"{path}: is there already and was not written by crd-fast; it is left alone")
    found, judges = changes(read), judged(read)
    tiles, taken = samples(read), phases(read)
    config = {
        name: value if isinstance(value, dict) else {name: value} for name, value in read.config.items()
    }
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    page = pages.get_template("report.html").render(
        name=read.folder.resolve().name,
        headline=headline(read, found),
        facts=facts(read),
        warnings=warnings(read, found),
        advice=advice(read, found),
        changes=found,
        judges=judges,
        evaluated=read.evaluated,
        notes=[prompts_note(read), base_note(read)] if read.evaluated else [],
        held_out=not trained_on(read),
        guided=guidance_scale(read) if any(change.guided for change in found) else None,
        charts=charts(read, judges),
        spent=spent(read),
        phases=taken,
        on_gpu=any(math.isfinite(phase.gpu_bytes) for phase in taken),
        duration=duration,
        samples=tiles,
        sections={name: settings(values) for name, values in config.items()},
        environment=settings(read.environment),
        label=label,
        signed=signed,
    )
    if out is not None:
        write_new(out, "--out", page.encode("utf-8"))
        return out
    try:
        write_atomically(path, page)
    except OSError as error:
        reason = f"{error.strerror}; crd-fast report with --out FILE writes it elsewhere"
        raise UserError(f"{path}: cannot be written: {reason}") from None
    return path


class Refresh(Observer):
    """Writes the page of the run in `folder` anew whenever an evaluation is done, but for the last one.

    That one's is written when the run has ended. A page that cannot be written is warned of, once.
    """

    def __init__(self, folder: Path, iterations: int):
        self.folder, self.iterations = folder, iterations
        self.works = True

    def evaluated(self, record: dict) -> None:
        if not self.works or record["iteration"] >= self.iterations:
            return
        try:
            write_report(self.folder)
        except Exception as error:  # a picture of a run is no reason to end it
            self.works = False
            logger.warning("warning: the report is not written until the run has ended: %s", error)
