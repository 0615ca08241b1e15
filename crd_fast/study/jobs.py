"""Several runs of a study at once, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from crd_fast.errors import UserError
from crd_fast.study.run import is_whole
from crd_fast.study.study import Cell

STOPPED = 130  # the exit code of a command that Ctrl-C ended
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_in_processes(
    source: str, output: Path, wanted: list[Cell], jobs: int, say: Callable[[str], None]
) -> bool:
    """Every run, `jobs` of them at a time. False where Ctrl-C left some.

    A run is the same command with `--task`, `--arm` and `--seed`, on its share of the threads; what it prints
    is in `seed-N.log` beside its folder. Where one fails no other is begun: UserError, with its last line,
    once those that were running have ended.
    """
    waiting = list(wanted)
    running: dict[subprocess.Popen, Cell] = {}
    failed: list[str] = []
    with _passing_on(running) as stopped:
        while running or (waiting and not failed and not stopped):
            while waiting and len(running) < jobs and not failed and not stopped:
                cell = waiting.pop(0)
                say(f"run {len(wanted) - len(waiting)} of {len(wanted)}: {cell.folder}")
                running[_begun(source, output, cell, jobs)] = cell
            time.sleep(0.2)
            for process in [each for each in running if each.poll() is not None]:
                cell = running.pop(process)
                if process.returncode not in (0, STOPPED, *(-number for number in stopped)):
                    failed.append(f"{cell.folder}: {_last_line(_log(output, cell), process.returncode)}")
    if failed:
        raise UserError("; ".join(failed))
    return all(is_whole(output / cell.folder, cell) for cell in wanted)


def _begun(source: str, output: Path, cell: Cell, jobs: int) -> subprocess.Popen:
    only = {"--task": cell.task, "--arm": cell.arm, "--seed": cell.seed}
    command = [sys.executable, "-m", "crd_fast", "study", source, "--output", str(output)]
    command += [f"{option}={value}" for option, value in only.items()]
    threads = max(1, torch.get_num_threads() // jobs)
    log = _log(output, cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # of Ctrl-C it hears from here, once
        )


@contextmanager
def _passing_on(running: dict[subprocess.Popen, Cell]) -> Iterator[list[int]]:
    """The signals that stop a run reach those that are running. The list gets what came."""
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        for process in list(running):
            process.send_signal(number)

    before = {
        number: signal.signal(number, hear)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log(output: Path, cell: Cell) -> Path:
    return output / cell.folder.parent / f"{cell.folder.name}.log"


def _last_line(log: Path, code: int) -> str:
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.removeprefix("error: ") for line in lines if line.strip()] if code > 0 else []
    return f"{said[-1] if said else ended} ({log})"
