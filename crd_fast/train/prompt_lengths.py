"""Prompts that are longer than text encoders read: said once, and refused where a reward needs the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from crd_fast.errors import UserError
from crd_fast.models.negative import KEY

if TYPE_CHECKING:
    from crd_fast.models.prompt_reader import PromptReader
    from crd_fast.rewards import Rewards

logger = logging.getLogger("crd_fast")


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
    negative = [entry.get(KEY) or "" for entry in entries]
    cut = reader.truncated([*(entry["prompt"] for entry in entries), *negative])
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
