"""What text encoders lose of prompts: everything without a vocabulary, or what they have no room for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from crd_fast.errors import UserError

# All files of one row must be there: where none is, transformers makes an empty vocabulary without a word.
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
)
PROBES = ("a red cat", "a tan dog")  # of the same lengths: where no letter is known they are alike
CHAT = "<|im_start|>user\n"  # stands before a prompt, and takes of its room, in two families

logger = logging.getLogger("crd_fast")


def check_tokenizers(folder: Path, index: dict) -> None:
    """Raises UserError naming the first tokenizer of the pipeline that has no vocabulary."""
    for name, part in index.items():
        if not name.startswith("tokenizer") or not isinstance(part, list) or part[0] is None:
            continue
        if not any(all((folder / name / file).is_file() for file in files) for files in VOCABULARIES):
            raise UserError(
                f"model.path: {folder / name}: expected a vocabulary (tokenizer.json, or vocab.json and "
                "merges.txt, or spiece.model), found none: the download may be incomplete"
            )


class PromptChecks:
    """Looks at prompts as they are encoded: counts those that are longer than the text encoders read.

    pipe: with its tokenizers. lengths: how many tokens each encoder reads, by its folder (`text_encoder_2`).
    Raises UserError if a tokenizer makes the same of different prompts.
    """

    def __init__(self, pipe: Any, lengths: dict[str, int], folder: Path):
        names = {name: name.replace("text_encoder", "tokenizer") for name in lengths}
        names = {name: found for name, found in names.items() if getattr(pipe, found, None) is not None}
        for name in names.values():
            one, other = (getattr(pipe, name)(probe).input_ids for probe in PROBES)
            if one == other:
                raise UserError(
                    f"model.path: {folder / name}: different prompts are encoded alike, {PROBES}: "
                    "the tokenizer has no vocabulary, the download may be incomplete"
                )
        # what a short encoder has no room for, a longer one still reads
        self.room = max((lengths[name] for name in names), default=0)
        self._readers = [getattr(pipe, names[name]) for name in names if lengths[name] == self.room]
        self._before = _tokens_before(pipe, self._readers[0]) if names else 0
        self.truncated = self.longest = 0

    def see(self, prompt: str) -> None:
        """Counts this prompt if its last words are cut."""
        if not self._readers:
            return
        tokens = min(
            len(tokenizer(prompt, truncation=False, verbose=False).input_ids) for tokenizer in self._readers
        )
        tokens += self._before
        if tokens > self.room:
            self.truncated += 1
            self.longest = max(self.longest, tokens)

    def say(self) -> None:
        """One line, if any was cut."""
        if self.truncated:
            logger.warning(
                "warning: %d %s truncated: the longest has %d tokens, the text encoder reads %d",
                self.truncated,
                "prompt was" if self.truncated == 1 else "prompts were",
                self.longest,
                self.room,
            )


def _tokens_before(pipe: Any, tokenizer: Any) -> int:
    """How many tokens of a pipeline's template take of a prompt's room."""
    family = type(pipe).__name__
    if family in ("Flux2KleinPipeline", "ZImagePipeline"):
        return len(tokenizer(CHAT).input_ids)
    if family == "QwenImagePipeline":  # the first of them are dropped after encoding
        before, _, _ = pipe.prompt_template_encode.partition("{}")
        return len(tokenizer(before).input_ids) - pipe.prompt_template_encode_start_idx
    return 1 if family == "SanaPipeline" else 0
