"""Encoded prompts on disk: one safetensors file a prompt, named by the hash of its text.

A folder belongs to one set of text encoders and settings, written into it as `encoder.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crd_fast.errors import UserError

IDENTITY = "encoder.json"
PIECES, PIECE_BYTES = 16, 1 << 16  # read of a large file


class PromptCache:
    """The embeddings of prompts by one text encoder. See `open_cache`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __contains__(self, prompt: str) -> bool:
        return self._path(prompt).exists()

    def get(self, prompt: str) -> dict[str, torch.Tensor]:
        """Raises UserError if the file is missing or damaged."""
        path = self._path(prompt)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.prompt_cache: {path} cannot be read, remove it ({error})") from None

    def put(self, prompt: str, embeddings: dict[str, torch.Tensor]) -> None:
        """Whole or not at all, also where several processes write the same prompt."""
        path = self._path(prompt)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(embeddings, partial)
        os.replace(partial, path)

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


def open_cache(setting: str, identity: dict[str, str | int]) -> PromptCache:
    """The cache that `model.prompt_cache` names: a folder, or `default` for one by the encoder's identity.

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
            partial = folder / f".{IDENTITY}.{os.getpid()}"  # other processes may be doing the same
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
    return PromptCache(folder)


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
    """A hash of all files in these folders: names, sizes, and content.

    Of a large file 16 evenly spaced pieces of 64 KiB: text encoders have up to 16 GB, and training them
    further changes every weight.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                _hash_file(digest, path, f"{folder.name}/{path.relative_to(folder)}")
    return digest.hexdigest()[:32]


def _hash_file(digest, path: Path, name: str) -> None:
    size = path.stat().st_size
    digest.update(f"{name} {size}\n".encode())
    with path.open("rb") as file:
        if size <= PIECES * PIECE_BYTES:
            digest.update(file.read())
            return
        for i in range(PIECES):
            file.seek(i * (size - PIECE_BYTES) // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
