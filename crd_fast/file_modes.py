"""Who may read a file: what the umask says, as with any other program's."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Gives a file, or all files in a folder, the mode of one that `open` makes.

    safetensors (0.8) makes files that only their owner can read. Where a file system has no modes, nothing is
    done.
    """
    mask = os.umask(0o077)  # it can only be read by setting it; meanwhile the others' files are private
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with contextlib.suppress(OSError):
                file.chmod(0o666 & ~mask)


def copy_files(folder: Path, out: Path) -> None:
    """Copies the files in a folder, whose own modes, read-only where it is put away, stay behind."""
    for path in folder.rglob("*"):
        if path.is_file():
            copy = out / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
