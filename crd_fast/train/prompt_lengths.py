"""Prompts that a model refuses, and those that are longer than text encoders read: said once, and refused
where a reward needs the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from crd_fast.errors import UserError
from crd_fast.models import negative
from crd_fast.prompts.lists import evaluated_lists
from crd_fast.prompts.source import place_of
from crd_fast.train.guidance import guided_twice

if TYPE_CHECKING:
    from crd_fast.config import Recipe
    from crd_fast.models.base import FlowModel
    from crd_fast.models.prompt_reader import PromptReader
    from crd_fast.rewards import Rewards
    from crd_fast.train.evaluate import HeldOut

logger = logging.getLogger("crd_fast")


def check_prompts(
    model: FlowModel,
    recipe: Recipe,
    held_out: HeldOut | None,
    trained: tuple[list[dict], Rewards] | None = None,
    say: bool = True,
) -> None:
    """Whether the model can do with the prompts: `check_readable` and `check_lengths`.

    trained: the prompts with their metadata, and who scores them. say: warnings, of guidance as well.
    """
    if trained:
        for line in guided_twice(model, recipe) if say else ():
            logger.warning("%s", line)
        check_readable(model, trained[0], recipe.guides_training, recipe.rollout.prompt_lists)
    if held_out:
        check_readable(model, held_out.entries, recipe.guides_evaluation, evaluated_lists(recipe))
    asked = [*([trained] if trained else []), *(held_out.asked if held_out else [])]
    check_lengths(model.prompt_reader, asked, say)


def check_readable(model: FlowModel, entries: list[dict], guided: bool, lists: Iterable[str]) -> None:
    """Raises UserError, with file and line, for the first prompt that the model refuses.

    entries: prompts with their metadata. guided: whether their negative prompts are needed. lists: what they
    were read from.
    """
    if found := model.unreadable(negative.texts(entries, guided)):
        text, reason = found
        place = place_of(text, lists)
        raise UserError(f"prompts: {place}: {reason}" if place else f"prompt: {reason}")


def check_lengths(
    reader: PromptReader | None, asked: Iterable[tuple[list[dict], Rewards]], say: bool = True
) -> None:
    """One warning with how many prompts are truncated, the longest, and how much is read.

    reader: None where the model refuses what does not fit. asked: prompts with their metadata, and who scores
    them.
    Raises UserError where a reward that checks prompts cannot do with what is read of one: the model is then
    never told what the reward looks for.
    """
    if reader is None:
        return
    asked = list(asked)
    entries = [entry for entries, _ in asked for entry in entries]
    if entries and not reader.reads_any:
        raise UserError(
            "model.text_length: expected room for a prompt, got none: what the pipeline puts before it takes "
            "all tokens that the text encoder reads"
        )
    led_away = [entry.get(negative.KEY) or "" for entry in entries]
    cut = reader.truncated([*(entry["prompt"] for entry in entries), *led_away])
    if not cut:
        return
    room = reader.room
    for entries, rewards in asked:
        if rewards.can_check:
            for entry in (entry for entry in entries if entry["prompt"] in cut):
                try:
                    rewards.check_cut(entry, reader.read(entry["prompt"]))
                except UserError as error:
                    raise UserError(
                        f"prompts: one of {cut[entry['prompt']]} tokens is truncated to {room} "
                        f"(model.text_length), and of what is left: {error}"
                    ) from None
    if say:
        logger.warning(
            "warning: %d %s truncated: the longest has %d tokens, the text encoder reads %d "
            "(model.text_length)",
            len(cut),
            "prompt is" if len(cut) == 1 else "prompts are",
            max(cut.values()),
            room,
        )
