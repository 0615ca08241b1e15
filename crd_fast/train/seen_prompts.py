"""Whether a run goes on with the prompts that it had: files may have been edited since its checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from crd_fast.config import Recipe
from crd_fast.prompts.lists import evaluation_prompts, own_files, splits, training_prompts
from crd_fast.prompts.source import same_prompt


@dataclass(frozen=True)
class SeenPrompts:
    """Digests of what a checkpoint's run has trained on and been evaluated with.

    trained: of the prompts in files, with their metadata; "" where all lists ship. evaluated: of the
    evaluation's; "" without one. held_out: of each of these, where they are held out of the files.
    """

    trained: str
    evaluated: str
    held_out: list[str]

    @classmethod
    def of(cls, recipe: Recipe) -> SeenPrompts:
        """Raises UserError for files that cannot be read."""
        trained = training_prompts(recipe).entries() if own_files(recipe) else []
        evaluated = evaluation_prompts(recipe) if recipe.evaluate.every else []
        held_out = evaluated if splits(recipe) else []
        return cls(
            _digest(trained), _digest(evaluated), [_digest(same_prompt(e["prompt"])) for e in held_out]
        )

    @property
    def state(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def trains_like(self, before: SeenPrompts) -> bool:
        """Whether the files have the same prompts for training, where both have any."""
        return self.trained == before.trained or not (self.trained and before.trained)

    def evaluates_like(self, before: SeenPrompts) -> bool:
        """The same of evaluations."""
        return self.evaluated == before.evaluated or not (self.evaluated and before.evaluated)

    def changes(self, before: SeenPrompts) -> Iterator[str]:
        """What people should know of prompts that are not as before, a line each."""
        if not self.trains_like(before):
            yield "rollout.prompts: the prompts are not those of before: later iterations draw from these"
        if moved := self.moved(before):
            yield moved

    def moved(self, before: SeenPrompts) -> str:
        """What people should know of held-out prompts that were not so before; "" where all were."""
        if not before.held_out or not (new := set(self.held_out) - set(before.held_out)):
            return ""
        return (
            f"{len(new)} of {len(self.held_out)} held-out prompts are not those of before and may have "
            "been trained on; evaluate.prompts names a file that stays as it is"
        )


def _digest(value: Any) -> str:
    if not value:
        return ""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
