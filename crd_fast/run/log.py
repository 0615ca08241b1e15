"""What a run leaves in its folder while it goes: recipe, environment, metrics, TensorBoard events."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from crd_fast.config import Recipe
from crd_fast.errors import UserError

METRICS, RECIPE, ENVIRONMENT = "metrics.jsonl", "config.yaml", "environment.json"


class RunLog:
    """The files of one run. `after`: the iteration it resumes from, later lines are dropped; None: a new run.

    Raises UserError if a new run's folder already holds one.
    """

    def __init__(self, output: Path, recipe: Recipe, after: int | None = None):
        if after is None:
            refuse_existing(output)
        output.mkdir(parents=True, exist_ok=True)
        self._metrics = output / METRICS
        if after is not None:
            kept = [line for line in read_metrics(output) if line["iteration"] <= after]
            self._replace_metrics(kept)
        write_atomically(output / RECIPE, recipe.to_yaml())
        write_atomically(output / ENVIRONMENT, json.dumps(environment(), indent=1))
        self._events = SummaryWriter(
            str(output / "tensorboard"), purge_step=None if after is None else after + 1
        )

    def write(self, record: dict, grid: np.ndarray | None = None) -> None:
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "iteration":
                self._events.add_scalar(name, value, record["iteration"])
        if grid is not None:
            self._events.add_image("samples", grid, record["iteration"], dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _replace_metrics(self, records: list[dict]) -> None:
        write_atomically(self._metrics, "".join(json.dumps(record) + "\n" for record in records))


def refuse_existing(output: Path) -> None:
    """Raises UserError if the folder already holds a run."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: expected a folder, got a file")
    for name in (METRICS, RECIPE, "checkpoints"):
        if (output / name).exists():
            raise UserError(
                f"--output {output}: already holds a run; choose another folder or --resume {output}"
            )


def read_metrics(run: Path) -> list[dict]:
    """The records of a run; a last line that was cut off by a kill is dropped."""
    path = run / METRICS
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path} line {number}: not JSON") from None
    return records


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def peak_rss_bytes() -> int:
    """The most memory this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict:
    """Machine and versions, for whoever reads the result later."""
    versions = {}
    for package in ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes", "crd-fast"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "machine": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": git_commit(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, with `+changes` if files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
