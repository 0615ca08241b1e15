"""Where prompts come from: the built-in world, or a file.

A file is `.jsonl` (one object a line with `prompt` and whatever metadata the reward needs, as GenEval's
files are) or anything else: one prompt a line, empty lines skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from crd_fast import world
from crd_fast.errors import UserError

BUILTIN, BUILTIN_HELDOUT = "builtin", "builtin-heldout"


class PromptSource:
    """Prompts as metadata dicts with a `prompt` key. `source` is a file or a name of the built-in world's."""

    def __init__(self, source: str):
        self.source = source
        self._entries = None if source in (BUILTIN, BUILTIN_HELDOUT) else read_prompts(Path(source))

    def entries(self) -> list[dict]:
        """Every prompt there is."""
        if self._entries is None:
            return [
                entry
                for entries in world.prompts(self.source == BUILTIN_HELDOUT).values()
                for entry in entries
            ]
        return self._entries

    def draw(self, count: int, seed: int, iteration: int) -> list[dict]:
        """The prompts of one training iteration: a function of seed and iteration alone.

        A file is gone through epoch by epoch, shuffled anew each time; the built-in world gives each
        category its equal share.
        """
        if self._entries is None:
            return world.draw_prompts(
                self.source == BUILTIN_HELDOUT, np.random.default_rng((seed, iteration)), count
            )
        drawn = []
        for position in range(iteration * count, (iteration + 1) * count):
            epoch, offset = divmod(position, len(self._entries))
            order = np.random.default_rng((seed, epoch)).permutation(len(self._entries))
            drawn.append(self._entries[order[offset]])
        return drawn

    def all(self, limit: int | None = None) -> list[dict]:
        """The prompts of an evaluation, the same ones every time."""
        if self._entries is None:
            return world.draw_prompts(self.source == BUILTIN_HELDOUT, np.random.default_rng(0), limit or 384)
        return self._entries[:limit]


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
    return entry
