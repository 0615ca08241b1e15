"""Where prompts come from: the built-in world, GenEval's categories, a generator of written words, or a file.

A file is `.jsonl` (one object a line with `prompt` and whatever metadata the reward needs, as GenEval's
files are) or anything else: one prompt a line, empty lines skipped.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from crd_fast.errors import UserError
from crd_fast.prompts.geneval_metadata import check_metadata
from crd_fast.worlds import WORLDS

# name: the module that has the prompts for training; those of NAME-heldout are never among them
SOURCES = {name: world.module for name, world in WORLDS.items()} | {
    "geneval": "crd_fast.prompts.coco",
    "ocr-words": "crd_fast.prompts.ocr_words",
}
HELDOUT = "-heldout"
EVALUATED = 384  # prompts of an evaluation where the source has many and the recipe gives no number


class PromptSource:
    """Prompts as metadata dicts with a `prompt` key.

    source: a file; `builtin` or `builtin-heldout`, the built-in world's; `geneval` or `geneval-heldout`, the
    same six categories over COCO's classes; `ocr-words` or `ocr-words-heldout`, scenes with a written word in
    double quotes, of which none is in both; `builtin-ocr` or `builtin-ocr-heldout`, signs with a short word.
    """

    def __init__(self, source: str):
        name = source.removesuffix(HELDOUT)
        self._held_out = name != source
        self._ships = name in SOURCES
        module: Any = import_module(SOURCES[name]) if self._ships else None
        self._categories: Any = module if hasattr(module, "draw_prompts") else None
        self._entries: list[dict] | None = None
        if module is None:
            self._entries = read_prompts(Path(source))
        elif self._categories is None:
            self._entries = module.entries(self._held_out)

    def entries(self) -> list[dict]:
        """Every prompt there is."""
        if self._entries is None:
            by_tag = self._categories.prompts(self._held_out)
            return [entry for entries in by_tag.values() for entry in entries]
        return self._entries

    def draw(self, count: int, seed: int, iteration: int) -> list[dict]:
        """The prompts of one training iteration: a function of seed and iteration alone.

        A list is gone through epoch by epoch, shuffled anew each time; where there are categories, each has
        its equal share.
        """
        if self._entries is None:
            return self._drawn(np.random.default_rng((seed, iteration)), count)
        drawn = []
        orders: dict[int, np.ndarray] = {}
        for position in range(iteration * count, (iteration + 1) * count):
            epoch, offset = divmod(position, len(self._entries))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((seed, epoch)).permutation(len(self._entries))
            drawn.append(self._entries[orders[epoch][offset]])
        return drawn

    def all(self, limit: int | None = None) -> list[dict]:
        """The prompts of an evaluation, the same ones every time."""
        if self._entries is None:
            return self._drawn(np.random.default_rng(0), limit or EVALUATED)
        if self._ships:
            limit = limit or EVALUATED
        return self._entries[:limit]

    def _drawn(self, rng: np.random.Generator, count: int) -> list[dict]:
        return self._categories.draw_prompts(self._held_out, rng, count)


def read_prompts(path: Path) -> list[dict]:
    """Raises UserError naming the line if the file is empty, not UTF-8 or malformed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts: {path}: cannot be read: {error.strerror}") from None
    entries = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"prompts: {path} line {number}: expected UTF-8 text") from None
        if text:
            entries.append(_entry(text, path, number) if path.suffix == ".jsonl" else {"prompt": text})
    if not entries:
        raise UserError(f"prompts: {path}: expected at least one prompt, got an empty file")
    return entries


def _entry(text: str, path: Path, number: int) -> dict:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts: {path} line {number}: not JSON: {error.msg}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError(
            f"prompts: {path} line {number}: expected an object with a `prompt`, got {text[:60]!r}"
        )
    if "tag" in entry and ("include" in entry or "exclude" in entry):  # GenEval's metadata
        try:
            check_metadata(entry)
        except ValueError as error:
            raise UserError(f"prompts: {path} line {number}: {error}") from None
    return entry
