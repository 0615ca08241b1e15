"""A reward alone, on pictures of one's own: what `crd-fast score` does."""

from __future__ import annotations

import itertools
import re
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
        members.sort(key=lambda i: metadata[i]["prompt"])
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
    same line of `prompts`. Or what comes with its prompts, where `prompts` is to be None: a .jsonl manifest,
    `image` and `prompt` on a line, the image by its path from the manifest's folder; or folders as GenEval
    has them, `00000/metadata.jsonl` with the prompt of the pictures in `00000/samples`. `prompts` may be a
    manifest as well, with paths from the folder of pictures, all of which it must name; metadata.jsonl in
    that folder takes its place.
    Raises UserError where there is no such file, or too few or too many prompts.
    """
    if images.is_file():
        if images.suffix.lower() != ".jsonl":
            raise UserError(f"--images {images}: expected a folder or a .jsonl manifest")
        _expect_none(prompts, images)
        return _named(images.parent, read_prompts(images), images)
    if not images.is_dir():
        raise UserError(f"--images {images}: expected a folder of pictures, found none")
    if not pictures_in(images) and (folders := _geneval_folders(images)):
        _expect_none(prompts, folders[0] / MANIFEST)
        return [pair for folder in folders for pair in _of_folder(folder)]
    paths, own = image_paths(images), images / MANIFEST
    if own.is_file():
        _expect_none(prompts, own)
        prompts = own
    if prompts is None:
        raise UserError(f"--prompts: expected a file, as {images} has no {MANIFEST}")
    entries = read_prompts(prompts)
    if any("image" in entry for entry in entries):
        return _whole(_named(images, entries, prompts), paths, prompts)
    if len(entries) != len(paths):
        raise UserError(
            f"--prompts {prompts}: expected {len(paths)} prompts, one for each picture, got {len(entries)}"
        )
    return [(path.name, path, entry) for path, entry in zip(paths, entries)]


def _expect_none(prompts: Path | None, manifest: Path) -> None:
    if prompts is not None:
        raise UserError(f"--prompts {prompts}: expected none beside {manifest}; leave one of them out")


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


def _geneval_folders(folder: Path) -> list[Path]:
    return _in_order(folder, [path for path in folder.iterdir() if (path / "samples").is_dir()])


def _of_folder(folder: Path) -> list[Pair]:
    """The pictures of one of GenEval's folders, which have one prompt."""
    entries = read_prompts(folder / MANIFEST)
    if len(entries) != 1:
        raise UserError(f"{folder / MANIFEST}: expected one prompt, got {len(entries)}")
    paths = image_paths(folder / "samples")
    return [(path.relative_to(folder.parent).as_posix(), path, entries[0]) for path in paths]


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
