"""Encoded prompts on disk: one safetensors file a prompt, named by the hash of its text.

A folder belongs to one set of text encoders and settings, written into it as `encoder.json`. What it holds
is bounded: what was not asked for the longest goes first. Rows of zeros at the end of a tensor, with which
families that mask their padding fill a text up, are not written but counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crd_fast.errors import UserError
from crd_fast.file_modes import follow_umask

IDENTITY = "encoder.json"
GIB = 2**30
PIECES, PIECE_EVERY, PIECE_BYTES = 16, 1 << 23, 1 << 16  # what is read of a large file

ABANDONED = 3600  # seconds after which a part of a file is that of a process that was killed


class PromptCache:
    """The embeddings of prompts by one text encoder, in at most `limit` bytes. See `open_cache`."""

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit
        self._bytes: int | None = None  # of all files, as far as this process knows

    def __contains__(self, prompt: str) -> bool:
        """Whether it is there. It counts as asked for."""
        return self._touch(prompt)

    def get(self, prompt: str) -> dict[str, torch.Tensor] | None:
        """None where it is missing. Raises UserError if the file is damaged."""
        if not self._touch(prompt):
            return None
        path = self._path(prompt)
        try:
            with safe_open(path, "pt") as file:
                rows = file.metadata() or {}
                return {key: _filled(file.get_tensor(key), rows.get(key)) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.prompt_cache: {path} cannot be read, remove it ({error})") from None

    def put(self, prompt: str, embeddings: dict[str, torch.Tensor], needed: Iterable[str] = ()) -> None:
        """Whole or not at all, also where several processes write the same prompt.

        Others make room for it, but never those in `needed`. Raises UserError where the disk takes no more.
        """
        if self._bytes is None:
            self._bytes = sum(self._size(path) for path in self.folder.glob("*.safetensors"))
        path = self._path(prompt)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # containers number processes alike
        before = self._size(path)
        kept = {key: _without_zeros(tensor) for key, tensor in embeddings.items()}
        rows = {key: str(len(v)) for key, v in embeddings.items() if kept[key].shape != v.shape}
        try:
            save_file(kept, partial, rows)
            follow_umask(partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"model.prompt_cache: {self.folder} cannot be written: {reason}; name another folder, or "
                "lower model.prompt_cache_gb"
            ) from None
        self._bytes += self._size(path) - before
        if self._bytes > self.limit:
            self._make_room({path, *map(self._path, needed)})

    def size(self, prompt: str) -> int:
        """Bytes on disk; 0 where it is missing."""
        return self._size(self._path(prompt))

    def _make_room(self, keep: set[Path]) -> None:
        """Removes files, the least recently used first, until the rest is within the limit."""
        for path in self.folder.glob("*.partial"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process may be making room as well
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                break
            if path not in keep:
                path.unlink(missing_ok=True)
                total -= size
        self._bytes = total

    def _touch(self, prompt: str) -> bool:
        try:
            os.utime(self._path(prompt))
        except FileNotFoundError:
            return False
        except OSError:  # somebody else's folder: it is there, and its order is its owner's
            return self._path(prompt).exists()
        return True

    @staticmethod
    def _size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


def _without_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Without the rows of zeros at its end, to the bit: a negative zero is none."""
    if tensor.ndim < 2:
        return tensor
    used = tensor.contiguous().view(torch.uint8).flatten(1).any(dim=1).nonzero()
    return tensor[: int(used[-1]) + 1 if len(used) else 0].contiguous()


def _filled(tensor: torch.Tensor, rows: str | None) -> torch.Tensor:
    """With zeros up to so many rows."""
    if rows is None:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(int(rows) - len(tensor), *tensor.shape[1:])])


def open_cache(setting: str, identity: dict[str, str | int], gib: float = math.inf) -> PromptCache:
    """The cache that `model.prompt_cache` names: a folder, or `default` for one by the encoder's identity.

    gib: the most that it holds, in GiB.
    Raises UserError if the folder holds the prompts of another encoder or cannot be written.
    """
    if setting == "default":
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder = home / "crd-fast" / "prompts" / digest[:16]
    else:
        folder = Path(setting)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = _read_identity(folder)
        if found is None:
            partial = folder / f".{IDENTITY}.{uuid.uuid4().hex}"  # other processes may be doing the same
            partial.write_text(json.dumps(identity, indent=1), encoding="utf-8")
            os.replace(partial, folder / IDENTITY)
            found = identity
    except OSError as error:
        raise UserError(f"model.prompt_cache: {folder} cannot be used: {error.strerror}") from None
    different = [key for key in identity if found.get(key) != identity[key]]
    if different:
        key = different[0]
        raise UserError(
            f"model.prompt_cache: {folder} was made by another text encoder ({key}: expected "
            f"{identity[key]}, got {found.get(key)}); name another folder or default"
        )
    return PromptCache(folder, gib * GIB)


def _read_identity(folder: Path) -> dict | None:
    try:
        identity = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(
                f"model.prompt_cache: {folder} holds something else (no {IDENTITY} in it)"
            ) from None
        return None
    except ValueError:
        raise UserError(f"model.prompt_cache: {folder / IDENTITY} is not JSON") from None
    return identity if isinstance(identity, dict) else {}


def fingerprint(folders: list[Path]) -> str:
    """A hash of all files in these folders."""
    return fingerprint_of_files(
        (f"{folder.name}/{path.relative_to(folder)}", path)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    )


def fingerprint_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of these: names, as they are given, sizes, and content.

    Of a large file evenly spaced pieces of 64 KiB, 16 or one for every 8 MiB: networks have many GB, and
    training them further changes whole layers.
    """
    digest = hashlib.sha256()
    for name, path in files:
        _hash_file(digest, path, name)
    return digest.hexdigest()[:32]


def _hash_file(digest, path: Path, name: str) -> None:
    size = path.stat().st_size
    digest.update(f"{name} {size}\n".encode())
    pieces = max(PIECES, size // PIECE_EVERY)
    with path.open("rb") as file:
        if size <= pieces * PIECE_BYTES:
            digest.update(file.read())
            return
        for i in range(pieces):
            file.seek(i * (size - PIECE_BYTES) // (pieces - 1))
            digest.update(file.read(PIECE_BYTES))
