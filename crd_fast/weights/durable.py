"""Folders that are whole or known to be damaged: flushed to the disk, with the hash of every file in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Writes the manifest of all files in the folder, and waits until all are on the disk, names too."""
    found = (path for path in folder.rglob("*") if path.is_file())
    paths = sorted(path for path in found if path != folder / MANIFEST)
    files = {path.relative_to(folder).as_posix(): _seen(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in (*paths, folder / MANIFEST):
        sync(path)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """What differs from the manifest, the first that is found; None where all is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {str(name): (int(seen["bytes"]), str(seen["sha256"])) for name, seen in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its text is damaged"
        return f"{MANIFEST} cannot be read: {reason}"
    for name, (size, digest) in wanted.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} is missing or damaged: expected {size} bytes, got {found}"
            if _seen(folder / name)["sha256"] != digest:
                return f"{name} is missing or damaged: its content is not what was written"
        except (OSError, ValueError) as error:
            return f"{name} is missing or damaged: {getattr(error, 'strerror', None) or error}"
    return None


def remove(folder: Path, first: str) -> None:
    """Removes the files in the manifest, `first` before all others, and the folders that are empty then.

    What somebody else put there stays. Where this is interrupted, it can be done again: the manifest goes
    after all that it names.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        with contextlib.suppress(OSError):
            folder.rmdir()  # an empty one; of another nobody can tell what is whose
        return
    names = [name for name in files if not Path(name).is_absolute() and ".." not in Path(name).parts]
    for name in sorted(names, key=lambda name: name != first):
        (folder / name).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()
    (folder / MANIFEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seen(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
