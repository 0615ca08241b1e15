"""How files are written: those named on the command line where nothing was, a run's own whole or not."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from crd_fast.errors import UserError
from crd_fast.file_modes import follow_umask


def at_home(path: Path) -> Path:
    """With the home folder for a `~` that the shell has left, as it does after `=`."""
    try:
        return path.expanduser()
    except RuntimeError:  # of nobody here
        return path


def check_new(path: Path, option: str) -> Path:
    """The same place, wherever a reward moves the working directory. To be called before the work.

    Raises UserError where something is there, or nothing can be written.
    """
    path = at_home(path)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise _unwritable(path, option, error) from None
    else:
        raise _unwritable(path, option, FileExistsError())
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {above} cannot be written to")
    return path.absolute()


def write_new(path: Path, option: str, content: bytes) -> None:
    """Also where something came to be there since `check_new` UserError is raised, and it is left alone."""
    path = at_home(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.write(content)
    except (OSError, ValueError) as error:
        raise _unwritable(path, option, error) from None


@contextmanager
def made_beside(path: Path, option: str) -> Iterator[Path]:
    """Gives where to write a file or folder; it gets the name `path` once all of it is there.

    Where something is raised inside, nothing is left. Raises UserError where something is at `path` already,
    which is left alone, or where nothing can be written.
    """
    path = at_home(path)
    check_new(path, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except (OSError, ValueError) as error:
        raise _unwritable(path, option, error) from None
    try:
        partial = holder / path.name
        yield partial
        follow_umask(partial)
        check_new(path, option)
        try:
            partial.rename(path)
        except OSError as error:
            raise _unwritable(path, option, error) from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # of what was read
        raise _unwritable(path, option, error) from None
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _unwritable(path: Path, option: str, error: Exception) -> UserError:
    """A ValueError is one of a name with a zero byte."""
    if isinstance(error, FileExistsError):
        return UserError(f"{option} {path}: already exists; choose another name")
    return UserError(f"{option} {path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file by one that is whole, whenever the process ends. Text is in UTF-8."""
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError:
        with suppress(OSError):  # of a disk that is read-only too
            partial.unlink()
        raise
    partial.replace(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError raised inside this file's name, which the system leaves out when a write fails."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
