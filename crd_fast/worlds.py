"""The worlds that ship with the package: prompts, their pictures, and a small model trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
FILES = ("transformer.safetensors", "text_encoder.safetensors", "tokenizer.json")  # of a model


@dataclass(frozen=True)
class World:
    """name: of its recipe, of its model in `model.path` and of its prompts in `rollout.prompts`.

    folder: the model's `FILES`. module: its prompts and pictures, and what a model must know of them:
    `HEIGHT`, `WIDTH`, `MAX_TOKENS` of a prompt, `vocabulary()`, and `spell(prompt)`, tokens between spaces.
    """

    name: str
    folder: Path
    module: str


WORLDS = {
    world.name: world
    for world in (
        World("builtin", PACKAGE / "builtin", "crd_fast.prompts.world"),
        World("builtin-ocr", PACKAGE / "builtin_ocr", "crd_fast.prompts.signs"),
    )
}
