"""Negative prompts: what guidance leads away from, in place of the empty prompt.

A text that is encoded as one is marked, because some pipelines encode it otherwise than a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

MARK = "\0"
KEY = "negative_prompt"  # in a prompt's metadata


def marked(text: str) -> str:
    """The empty prompt is encoded as a negative one everywhere, and needs no mark."""
    return MARK + text if text else ""


def unmarked(prompt: str) -> str:
    return prompt.removeprefix(MARK)


def is_marked(prompt: str) -> bool:
    return prompt.startswith(MARK)


def negatives(entries: Iterable[dict]) -> list[str]:
    """Each prompt's, marked; the empty prompt where it has none."""
    return [marked(entry.get(KEY) or "") for entry in entries]


def texts(entries: Iterable[dict], guided: bool) -> Iterator[str]:
    """What is to be encoded of prompts with their metadata: with their negative prompts where guidance is."""
    for entry in entries:
        yield entry["prompt"]
        if guided and (negative := entry.get(KEY)):
            yield marked(negative)


def probe(entries: Iterable[dict]) -> list[str]:
    """The first negative prompt, so that a model that takes none says so before anything is encoded."""
    return list(islice(filter(None, negatives(entries)), 1))


def encode_negatives(model, entries: Iterable[dict]) -> dict:
    """Embeddings of the prompts' negative ones: one for each, or a single one where all have the same.

    Each tensor with a first axis of P, or 1.
    """
    found = negatives(entries)
    return model.encode_prompts(found if len(set(found)) > 1 else found[:1])
