"""A reward alone, on pictures of one's own: what `crd-fast score` does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from crd_fast.errors import UserError, reason_of
from crd_fast.prompts.source import read_prompts
from crd_fast.rewards import Rewards
from crd_fast.rewards.rgb import to_rgb
from crd_fast.rewards.scoring import with_none

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MANIFEST = "metadata.jsonl"
Pair = tuple[str, Path, dict]  # a picture's name, its file, its prompt's metadata


def score_pictures(reward: str, settings: dict, images: Path, prompts: Path | None) -> list[dict]:
    """Pictures with their prompts and scores, as `pairs` finds them.

    Returns dicts with `image`, `prompt` and `score`, None where the reward does not score. Pictures of one
    size are scored together, in calls of at most 64 that do not part pictures of one prompt.
    Raises UserError, one line, for pictures without prompts, a file that is no picture, and whatever the
    reward refuses.
    """
    found = pairs(images, prompts)
    metadata = [entry for _, _, entry in found]
    rewards = Rewards({reward: {**settings, "weight": 1.0}})
    rewards.check(metadata)
    pixels = [read_image(path) for _, path, _ in found]
    by_size: dict[tuple, list[int]] = {}
    for i, image in enumerate(pixels):
        by_size.setdefault(image.shape, []).append(i)
    scores = np.empty(len(pixels))
    for members in by_size.values():
        stacked = np.stack([pixels[i] for i in members])
        scores[members] = rewards.score(stacked, [metadata[i] for i in members])[reward]
    rewards.close()
    return [
        {"image": name, "prompt": entry["prompt"], "score": score}
        for (name, _, entry), score in zip(found, with_none(scores))
    ]


def pairs(images: Path, prompts: Path | None) -> list[Pair]:
    """Which prompt belongs to which picture.

    images: a folder of pictures, in natural order of their names (2 before 10), each with the prompt on the
    same line of `prompts`; or of folders as GenEval has them, `00000/metadata.jsonl` with the prompt of the
    pictures in `00000/samples`, where `prompts` may be None; or a .jsonl manifest, `image` and `prompt` on a
    line, the image by its path from the manifest's folder. `prompts` may be such a manifest as well, with
    paths from the folder of pictures, all of which it must name.
    Raises UserError where there is no such file, too few or too many prompts, or where a manifest in the
    folder says otherwise than the order of files.
    """
    if images.is_file():
        if images.suffix.lower() != ".jsonl":
            raise UserError(f"--images {images}: expected a folder or a .jsonl manifest")
        if prompts is not None:
            raise UserError(f"--prompts {prompts}: expected none, as the manifest {images} has prompts")
        return _named(images.parent, read_prompts(images), images)
    if not images.is_dir():
        raise UserError(f"--images {images}: expected a folder of pictures, found none")
    if not pictures_in(images) and (folders := _geneval_folders(images)):
        return _of_folders(images, folders, prompts)
    paths = image_paths(images)
    own = images / MANIFEST
    if prompts is None:
        if not own.is_file():
            raise UserError(f"--prompts: expected a file, as {images} has no {MANIFEST}")
        prompts = own
    entries = read_prompts(prompts)
    if any("image" in entry for entry in entries):
        return _whole(_named(images, entries, prompts), paths, prompts)
    if len(entries) != len(paths):
        raise UserError(
            f"--prompts {prompts}: expected {len(paths)} prompts, one for each picture, got {len(entries)}"
        )
    found = [(path.name, path, entry) for path, entry in zip(paths, entries)]
    if own.is_file() and own != prompts:
        _agree(found, own, prompts)
    return found


def _named(folder: Path, entries: list[dict], manifest: Path) -> list[Pair]:
    """Every entry with the picture that it names."""
    found = []
    for entry in entries:
        name = entry.get("image")
        if not isinstance(name, str) or not name:
            raise UserError(f"{manifest}: expected an `image` beside every prompt, got {str(entry)[:80]}")
        if not (folder / name).is_file():
            raise UserError(f"{manifest}: {name}: expected a picture in {folder}, found none")
        found.append((name, folder / name, entry))
    return found


def _whole(named: list[Pair], paths: list[Path], manifest: Path) -> list[Pair]:
    left = {path.resolve() for path in paths} - {path.resolve() for _, path, _ in named}
    if left:
        raise UserError(f"{manifest}: expected every picture, {min(left).name} is not named in it")
    return named


def _agree(found: list[Pair], manifest: Path, prompts: Path) -> None:
    """Raises UserError where the manifest in the folder pairs a picture with another prompt."""
    try:
        entries = read_prompts(manifest)
    except UserError:  # somebody's file about something else
        return
    said = {}
    for entry in entries:
        name = entry.get("image", entry.get("file_name"))
        if isinstance(name, str):
            said[name] = entry["prompt"]
    for name, _, entry in found:
        if said.get(name, entry["prompt"]) != entry["prompt"]:
            raise UserError(
                f"--prompts {prompts}: the order of files gives {name} the prompt {entry['prompt'][:60]!r}, "
                f"{manifest} says {said[name][:60]!r}; leave one of them out"
            )


def _geneval_folders(folder: Path) -> list[Path]:
    return _in_order(folder, [path for path in folder.iterdir() if (path / "samples").is_dir()])


def _of_folders(images: Path, folders: list[Path], prompts: Path | None) -> list[Pair]:
    entries = read_prompts(prompts) if prompts is not None else []
    if prompts is not None and len(entries) != len(folders):
        raise UserError(
            f"--prompts {prompts}: expected {len(folders)} prompts, one for each folder, got {len(entries)}"
        )
    found = []
    for i, folder in enumerate(folders):
        own = folder / MANIFEST
        said = list(_one_prompt(own))
        if prompts is None and not said:
            raise UserError(f"--images {images}: {own} is missing; expected it or --prompts")
        if prompts is not None and said and said[0]["prompt"] != entries[i]["prompt"]:
            raise UserError(
                f"--prompts {prompts}: the order of folders gives {folder.name} the prompt "
                f"{entries[i]['prompt'][:60]!r}, {own} says {said[0]['prompt'][:60]!r}"
            )
        entry = entries[i] if prompts is not None else said[0]
        paths = image_paths(folder / "samples")
        found += [(path.relative_to(images).as_posix(), path, entry) for path in paths]
    return found


def _one_prompt(manifest: Path) -> Iterator[dict]:
    if manifest.is_file():
        entries = read_prompts(manifest)
        if len(entries) > 1:
            raise UserError(f"{manifest}: expected one prompt, got {len(entries)}")
        yield entries[0]


def pictures_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]


def image_paths(folder: Path) -> list[Path]:
    """A folder's pictures in natural order. Raises UserError if there are none, or two for one place."""
    paths = pictures_in(folder)
    if not paths:
        raise UserError(f"--images {folder}: expected pictures ({', '.join(SUFFIXES)}), found none")
    return _in_order(folder, paths)


def _in_order(folder: Path, paths: list[Path]) -> list[Path]:
    paths = sorted(paths, key=natural)
    for path, other in itertools.pairwise(paths):
        if natural(path) == natural(other):
            names = f"{path.name} and {other.name}"
            raise UserError(f"--images {folder}: expected names in one order, got {names} for one place")
    return paths


def natural(path: Path) -> list[tuple[int, str]]:
    """A name's place in natural order, 2 before 10, whatever its suffix and its leading zeros."""
    parts = re.split("([0-9]+)", path.stem)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def read_image(path: Path) -> np.ndarray:
    """uint8 RGB (height, width, 3), by `to_rgb`. Raises UserError for what is no picture."""
    try:
        # by its bytes: of a file Pillow maps what is not compressed, and then turns a TIFF wrongly
        with Image.open(BytesIO(path.read_bytes())) as image:
            return to_rgb(image)
    except Exception as error:  # whatever a decoder raises on a damaged file
        reason = reason_of(error)
        raise UserError(f"{path}: cannot be read as a picture: {reason}") from None
