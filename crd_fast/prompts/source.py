"""Where prompts come from: the built-in world, GenEval's categories, a generator of written words, or a file.

`negative_prompt` beside a prompt is what guidance leads away from, in place of the empty prompt.

A file is UTF-8 and one of: `.jsonl`, one object a line with `prompt` and whatever metadata the reward needs,
as GenEval's files are; `.json`, a list of such objects or of texts; `.csv` or `.tsv`, a table with a column
`prompt`, its other columns metadata as text; `.txt`, one prompt a line, empty lines skipped.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from crd_fast.errors import UserError, did_you_mean, unreadable
from crd_fast.prompts.geneval_metadata import check_metadata, draw_prompts
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
    It is read without the prompts in `without`, as `same_prompt` has them, and without those whose `tag` is
    one of `without_categories`.
    """

    def __init__(self, source: str, without: Collection[str] = (), without_categories: Collection[str] = ()):
        name = source.removesuffix(HELDOUT)
        self._held_out = name != source
        self._ships = name in SOURCES
        module: Any = import_module(SOURCES[name]) if self._ships else None
        self._categories: Any = module if hasattr(module, "prompts") else None
        self._without, self._without_categories = frozenset(without), frozenset(without_categories)
        self._entries: list[dict] | None = None
        if self._categories is None:
            read = read_prompts(Path(source)) if module is None else module.entries(self._held_out)
            read = [entry for entry in read if category_of(entry) not in self._without_categories]
            self._entries = self._left_of(read)

    def _left_of(self, entries: list[dict]) -> list[dict]:
        if not self._without:
            return entries
        return [entry for entry in entries if same_prompt(entry["prompt"]) not in self._without]

    @functools.cached_property
    def _by_tag(self) -> dict[str, list[dict]]:
        """The prompts of a list that ships, by category, for each category that has one left."""
        there = self._categories.prompts(self._held_out)
        left = {tag: self._left_of(of) for tag, of in there.items() if tag not in self._without_categories}
        return {tag: entries for tag, entries in left.items() if entries}

    def entries(self) -> list[dict]:
        """Every prompt there is."""
        if self._entries is None:
            return [entry for entries in self._by_tag.values() for entry in entries]
        return self._entries

    def draw(self, first: int, count: int, seed: int, iteration: int, stream: int) -> list[dict]:
        """Prompts of one training iteration, those after the first so many of all that a run draws here.

        A list is gone through epoch by epoch, shuffled anew each time; where there are categories, each has
        its equal share. stream: of randomness, another for each source of a run.
        """
        if self._entries is None:
            return self._drawn(np.random.default_rng((seed, iteration, stream)), count)
        drawn = []
        orders: dict[int, np.ndarray] = {}
        for position in range(first, first + count):
            epoch, offset = divmod(position, len(self._entries))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((seed, epoch, stream)).permutation(len(self._entries))
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
        return draw_prompts(self._by_tag, rng, count)


def category_of(entry: dict) -> str:
    """A prompt's category, "" where it has none."""
    return str(entry.get("tag", ""))


def same_prompt(prompt: str) -> str:
    """Alike for prompts that differ in case and white space alone."""
    return " ".join(prompt.split()).casefold()


def read_prompts(path: Path) -> list[dict]:
    """Raises UserError naming the line if the file is of no known kind, empty, not UTF-8 or malformed."""
    return [entry for _, entry in _read(path)]


def place_of(text: str, lists: Iterable[str]) -> str:
    """Where a prompt or negative prompt stands, as `FILE line 3`; "" where it is in no file of the lists."""
    for name in lists:
        if name.removesuffix(HELDOUT) not in SOURCES:
            for where, entry in _read(Path(name)):
                if text in (entry["prompt"], entry.get("negative_prompt")):
                    return where
    return ""


def _read(path: Path) -> list[tuple[str, dict]]:
    """Each prompt behind its file and line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        if not path.suffix and not path.exists():  # a list that ships, with a slip of the pen
            lists = [*SOURCES, *(name + HELDOUT for name in SOURCES)]
            hint = did_you_mean(path.name, lists) or f"; lists that ship: {', '.join(lists)}"
            raise UserError(f"prompts: {path}: no such file{hint}") from None
        raise UserError(f"prompts: {unreadable(path, error, READERS)}") from None
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UserError(f"prompts: {path}: expected a name that ends in {', '.join(READERS)}")
    lines = []
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            lines.append(line.decode("utf-8").removeprefix("\ufeff"))  # the mark that some editors begin with
        except UnicodeDecodeError:
            raise UserError(f"prompts: {path} line {number}: expected UTF-8 text") from None
    entries = list(READERS[kind](lines, path))
    if not entries:
        raise UserError(f"prompts: {path}: expected at least one prompt, got an empty file")
    return entries


def _lines(lines: list[str], path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _entry({"prompt": line.strip()}, where)


def _json_lines(lines: list[str], path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _entry(_parsed(line.strip(), where), where)


def _json_list(lines: list[str], path: Path) -> Iterator[tuple[str, dict]]:
    if not any(line.strip() for line in lines):
        return
    found = _parsed("".join(lines), str(path))
    if not isinstance(found, list):
        raise UserError(f"prompts: {path}: expected a list of prompts, got {type(found).__name__}")
    for number, item in enumerate(found, start=1):
        where = f"{path} entry {number}"
        yield where, _entry({"prompt": item} if isinstance(item, str) else item, where)


def _table(lines: list[str], path: Path, delimiter: str) -> Iterator[tuple[str, dict]]:
    """The column `prompt`, however it is capitalised; the others are metadata, as text."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] = []
    try:
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if not any(field.strip() for field in row):
                continue
            if not columns:
                columns = [_column(name) for name in row]
                if columns.count("prompt") != 1 or len(set(columns)) < len(columns):
                    wanted = "columns that differ with one `prompt` among them"
                    raise UserError(f"prompts: {where}: expected {wanted}, got {', '.join(row)[:200]!r}")
                continue
            if len(row) != len(columns):
                raise UserError(f"prompts: {where}: expected {len(columns)} fields, got {len(row)}")
            entry = dict(zip(columns, row)) | {"prompt": row[columns.index("prompt")].strip()}
            yield where, _entry(entry, where)
    except csv.Error as error:
        raise UserError(f"prompts: {path} line {rows.line_num}: {error}") from None


def _column(name: str) -> str:
    name = name.strip()
    return "prompt" if name.lower() == "prompt" else name


READERS: dict[str, Callable[[list[str], Path], Iterator[tuple[str, dict]]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": functools.partial(_table, delimiter=","),
    ".tsv": functools.partial(_table, delimiter="\t"),
}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
    except json.JSONDecodeError as error:
        raise UserError(f"prompts: {where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise UserError(f"prompts: {where}: not JSON: a number or a nesting that is too long") from None


def _once(pairs: list[tuple[str, Any]], where: str) -> dict:
    """The object that a file has. Of two with one key Python would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"prompts: {where}: expected keys that differ, got {twice!r} twice")
    return found


def check_text(where: str, text: str) -> None:
    """Raises UserError, which begins with `where`, for what no tokenizer takes."""
    if "\0" in text:  # what marks negative prompts, and text in no file that people write
        raise UserError(f"{where}: expected text, got a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in text):  # in JSON, and in arguments that are no UTF-8
        raise UserError(f"{where}: expected text, got half a pair of surrogates")


def _entry(entry: Any, where: str) -> dict:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        got = repr(entry)[:60]
        raise UserError(f"prompts: {where}: expected an object with a `prompt`, got {got}")
    if not isinstance(entry.get("negative_prompt") or "", str):
        raise UserError(
            f"prompts: {where}: negative_prompt: expected text, got {entry['negative_prompt']!r:.60}"
        )
    if not entry["prompt"].strip():
        raise UserError(f"prompts: {where}: expected a prompt, got none")
    check_text(f"prompts: {where}", entry["prompt"] + (entry.get("negative_prompt") or ""))
    if "tag" in entry and ("include" in entry or "exclude" in entry):  # GenEval's metadata
        try:
            check_metadata(entry)
        except ValueError as error:
            raise UserError(f"prompts: {where}: {error}") from None
    return entry
