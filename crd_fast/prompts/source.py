"""Where prompts come from: the built-in world, GenEval's categories, a generator of written words, or a file.

A file is `.jsonl` (one object a line with `prompt` and whatever metadata the reward needs, as GenEval's
files are) or anything else: one prompt a line, empty lines skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from crd_fast.errors import UserError
from crd_fast.prompts import coco, ocr_words, signs, world

BUILTIN, BUILTIN_HELDOUT = "builtin", "builtin-heldout"
GENEVAL, GENEVAL_HELDOUT = "geneval", "geneval-heldout"
OCR_WORDS, OCR_WORDS_HELDOUT = "ocr-words", "ocr-words-heldout"
SIGNS, SIGNS_HELDOUT = "builtin-ocr", "builtin-ocr-heldout"
EVALUATED = 384  # prompts of an evaluation where the source has many and the recipe gives no number


class PromptSource:
    """Prompts as metadata dicts with a `prompt` key.

    source: a file; `builtin` or `builtin-heldout`, the built-in world's; `geneval` or `geneval-heldout`, the
    same six categories over COCO's classes; `ocr-words` or `ocr-words-heldout`, scenes with a written word in
    double quotes, of which none is in both; `builtin-ocr` or `builtin-ocr-heldout`, signs with a short word.
    """

    def __init__(self, source: str):
        self.source = source
        self._entries = None
        if source in (BUILTIN, BUILTIN_HELDOUT):
            self._categories = world
        elif source in (GENEVAL, GENEVAL_HELDOUT):
            self._categories = coco
        elif source in (OCR_WORDS, OCR_WORDS_HELDOUT):
            self._entries = ocr_words.entries(source == OCR_WORDS_HELDOUT)
        elif source in (SIGNS, SIGNS_HELDOUT):
            self._entries = signs.entries(source == SIGNS_HELDOUT)
        else:
            self._entries = read_prompts(Path(source))

    def entries(self) -> list[dict]:
        """Every prompt there is."""
        if self._entries is None:
            by_tag = self._categories.prompts(self.source.endswith("-heldout"))
            return [entry for entries in by_tag.values() for entry in entries]
        return self._entries

    def draw(self, count: int, seed: int, iteration: int) -> list[dict]:
        """The prompts of one training iteration: a function of seed and iteration alone.

        A list is gone through epoch by epoch, shuffled anew each time; where there are categories, each has
        its equal share.
        """
        if self._entries is None:
            return self._drawn(np.random.default_rng((seed, iteration)), count)
        drawn, orders = [], {}
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
        if self.source in (OCR_WORDS, OCR_WORDS_HELDOUT, SIGNS, SIGNS_HELDOUT):
            limit = limit or EVALUATED
        return self._entries[:limit]

    def _drawn(self, rng: np.random.Generator, count: int) -> list[dict]:
        return self._categories.draw_prompts(self.source.endswith("-heldout"), rng, count)


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
        from crd_fast.rewards.geneval import check_metadata

        try:
            check_metadata(entry)
        except ValueError as error:
            raise UserError(f"prompts: {path} line {number}: {error}") from None
    return entry
