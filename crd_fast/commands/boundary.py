"""Between what a command runs and the person who typed it: whatever is raised becomes one line.

A reward, a file system, a library's loader, a decoder of pictures: none of them is ours, and each raises what
it likes. The line names the file and the reason, and where the traceback was written to.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from crd_fast.errors import RaisedByAll, UserError
from crd_fast.launched import launched_rank

FILE = "error.txt"
LONGEST = 600  # characters of a message that a library wrote
LOST = ("by peer", "remote process exited")  # of gloo and NCCL, where another process is gone
OTHER_ENDED = (
    "another process has ended; its own line says why, its traceback is in error.txt (rank 0) or "
    "error-rank-N.txt of the run's folder; where there is neither it was killed, as the system does when "
    "memory runs out"
)
LESS_MEMORY = (
    "smaller rollout.samples_per_prompt, rollout.prompts_per_iteration, rollout.resolution or micro-batches, "
    "or a command's --samples or --size, need less; crd-fast plan says how much a recipe needs"
)
PACKAGE = str(Path(__file__).parents[1])
# what typer itself turns into an answer, and the end of a pipe that is read no further
OURS = (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError)


@contextmanager
def leaving_traceback(folder: Path | None = None) -> Iterator[None]:
    """Whatever is raised inside, SystemExit too, as UserError; its traceback goes into the folder.

    Without a folder, or where it cannot be written, into a file among the temporary ones. Of several
    processes each has a file of its own, and leaves what all raise to the first. A UserError with nothing
    behind it passes as it is.
    """
    try:
        yield
    except OURS:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, RaisedByAll) and launched_rank():
            raise typer.Exit(2) from None
        ours = isinstance(error, UserError)
        if ours and (error.__cause__ is None or folder is None or not folder.is_dir()):
            raise
        path = _write(error, folder)
        found = f"; traceback in {path}" if path else ""
        line = f"{error if ours else _line(error)}{found}"
        raise (type(error) if isinstance(error, UserError) else UserError)(line) from None


def bounded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, out of which comes nothing but UserError and what is typer's. Ctrl-C ends it in a line."""

    @functools.wraps(command)
    def run(*arguments, **options):
        try:
            with leaving_traceback():
                command(*arguments, **options)
        except KeyboardInterrupt:  # of which typer says nothing, or "Aborted.", by its version
            print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def _line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"something wanted to end the process (SystemExit: {error}){_where(error)}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_where(error)}"
    message = " ".join(str(error).split())
    message = message if len(message) <= LONGEST else message[:LONGEST] + "..."
    if launched_rank() is not None and isinstance(error, RuntimeError) and any(w in message for w in LOST):
        return OTHER_ENDED
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in message:
        return f"out of memory on the host: {message}{_where(error)}; {LESS_MEMORY}"
    return f"{type(error).__name__}{': ' * bool(message)}{message}{_where(error)}"


def _where(error: BaseException) -> str:
    """Where it was raised, and by which line here it was called."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    last = [frames[-1], *own[-1:]]
    return f" ({', called from '.join(dict.fromkeys(f'{f.filename} line {f.lineno}' for f in last))})"


def _write(error: BaseException, folder: Path | None) -> Path | None:
    from crd_fast.run.new_files import write_atomically

    text = "".join(traceback.format_exception(error))
    if folder is not None and folder.is_dir():
        rank = launched_rank()  # the others fail too, as one of them is gone
        path = folder / (f"error-rank-{rank}.txt" if rank else FILE)
        try:
            write_atomically(path, text.encode("utf-8", "replace"))
            return path
        except OSError:
            pass
    try:
        descriptor, name = tempfile.mkstemp(prefix="crd-fast-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:
        return None
    return Path(name)
