"""What a pipeline's text encoders read of prompts: nothing without a vocabulary, and no more than fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from crd_fast.errors import UserError

# Of the same lengths, word by word: where no letter is known they are alike.
PROBES = ("a red cat", "a tan dog")
PLACEHOLDER = "crd_fast_prompt"


@dataclass(frozen=True)
class Reading:
    """How a pipeline gives prompts to one tokenizer.

    text: a prompt as the tokenizer gets it, with what stands before it and without what follows. tokens: of
    that text, the tokenizer's own marks included, the text encoder reads so many.
    """

    tokenizer: Any
    text: Callable[[str], str]
    tokens: int

    def count(self, prompts: list[str]) -> list[int]:
        """Tokens of each, as many as there are."""
        texts = [self.text(prompt) for prompt in prompts]
        return [len(ids) for ids in self.tokenizer(texts, verbose=False).input_ids] if texts else []

    @property
    def before(self) -> int:
        """Tokens that are no prompt's."""
        return self.count([""])[0]


class PromptReader:
    """A prompt is truncated where every text encoder of the pipeline leaves out its end.

    What the shorter of two has no room for is not lost as long as the other reads on.
    """

    def __init__(self, readings: Iterable[Reading]):
        self._readings = list(readings)

    @property
    def reads_any(self) -> bool:
        """Whether any token of any prompt is read."""
        return not self._readings or self.room > 0

    @property
    def room(self) -> int:
        """How many tokens of a prompt the encoder that reads most has room for."""
        longest = self._longest()
        return max(0, longest.tokens - longest.before)

    def truncated(self, prompts: Iterable[str]) -> dict[str, int]:
        """The prompts that are, with the tokens they have for the encoder that reads most."""
        cut = list(dict.fromkeys(prompts))
        if not self._readings:
            return {}
        for reading in self._readings:
            cut = [prompt for prompt, n in zip(cut, reading.count(cut)) if n > reading.tokens]
        longest = self._longest()
        before = longest.before
        return {prompt: count - before for prompt, count in zip(cut, longest.count(cut))}

    def read(self, prompt: str) -> str:
        """Its beginning, as much as one of the encoders reads."""
        return max((_beginning(reading, prompt) for reading in self._readings), key=len)

    def _longest(self) -> Reading:
        return max(self._readings, key=lambda reading: reading.tokens - reading.before)


def _beginning(reading: Reading, prompt: str) -> str:
    shortest, longest = 0, len(prompt)
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if reading.count([prompt[:middle]])[0] <= reading.tokens:
            shortest = middle
        else:
            longest = middle - 1
    return prompt[:shortest]


def load_tokenizers(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's tokenizers by name. Raises UserError for one to which different prompts are the same."""
    tokenizers = {}
    for name, part in index.items():
        if not name.startswith("tokenizer") or not isinstance(part, list) or part[0] is None:
            continue
        where = folder / name
        try:
            tokenizer = getattr(transformers, part[1]).from_pretrained(where)
            one, other = (tokenizer(probe).input_ids for probe in PROBES)
        except Exception as error:  # the Rust library raises bare ones
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"model.path: {where}: the tokenizer cannot be loaded: {reason}") from None
        if one == other:
            raise UserError(
                f"model.path: {where}: expected a tokenizer that tells {PROBES[0]!r} from {PROBES[1]!r}, got "
                "one that encodes both alike: its vocabulary is empty, the download may be incomplete"
            )
        tokenizers[name] = tokenizer
    return tokenizers


def before_prompt(tokenizer: Any, enable_thinking: bool) -> str:
    """What the tokenizer's chat template puts before a prompt."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLACEHOLDER}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    return text.partition(PLACEHOLDER)[0]
