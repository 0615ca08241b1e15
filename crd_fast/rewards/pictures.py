"""A reward alone, on pictures in a folder: what `crd-fast score` does."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.prompts.source import read_prompts
from crd_fast.rewards import Rewards

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def score_folder(reward: str, settings: dict, folder: Path, prompts: Path) -> list[dict]:
    """The pictures in natural order of their names (2 before 10), each with the prompt on the same line and
    its score.

    Returns dicts with `image`, `prompt` and `score`. Pictures of one size are scored together, in calls of
    at most 64 that do not part pictures of one prompt.
    Raises UserError, one line, for a folder without pictures, another number of prompts, and whatever the
    reward refuses.
    """
    paths = image_paths(folder)
    metadata = read_prompts(prompts)
    if len(metadata) != len(paths):
        raise UserError(
            f"--prompts {prompts}: expected {len(paths)} prompts, one for each picture, got {len(metadata)}"
        )
    rewards = Rewards({reward: {**settings, "weight": 1.0}})
    rewards.check(metadata)
    images = [read_image(path) for path in paths]
    by_size: dict[tuple, list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(i)
    scores = np.empty(len(images))
    for members in by_size.values():
        stacked = np.stack([images[i] for i in members])
        scores[members] = rewards.score(stacked, [metadata[i] for i in members])[reward]
    rewards.close()
    return [
        {"image": path.name, "prompt": entry["prompt"], "score": float(score)}
        for path, entry, score in zip(paths, metadata, scores)
    ]


def image_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--images {folder}: expected a folder of pictures, found none")
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES), key=natural)
    if not paths:
        raise UserError(f"--images {folder}: expected pictures ({', '.join(SUFFIXES)}), found none")
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
    """uint8 RGB (height, width, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture: {error}") from None
