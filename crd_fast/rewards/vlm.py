"""A vision language model as the judge: any server that speaks OpenAI's chat protocol (vLLM, SGLang, hosted).

    rewards: {vlm: {url: "http://127.0.0.1:8000/v1", model: Qwen/Qwen2.5-VL-7B-Instruct}}
    eval_rewards: {vlm: {url: ..., model: ..., question: "From 0 to 10: ... {prompt}?", answer: number}}

With `answer: probability` the score is P(yes) / (P(yes) + P(no)) of the first token: VQAScore's P(yes)
(arXiv 2404.01291) over the two words alone, a smooth signal, for servers that give log-probabilities. With
`answer: number` it is the first number of the answer, mapped from `range` to 0 to 1.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from crd_fast.errors import UserError
from crd_fast.rewards.http import TRY_AGAIN, JsonClient, NoAnswer, encode, shortened

QUESTION = 'Does this picture show "{prompt}"? Answer yes or no.'
FIELD = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)")
MOST_ALTERNATIVES = 20  # as many as the protocol gives
REMEMBERED = 16384  # answers
MOST_UNANSWERED = 64  # pictures in a row, after which it is not the pictures

logger = logging.getLogger("crd_fast")


class VLM:
    """Asks a question about each picture.

    url: the protocol's base, which ends in /v1 as a rule; token_env, timeout, retries: see `JsonClient`;
    statuses 429, 500 and 502 to 504 are tried again. model: as the server calls it. question: `{prompt}` and
    `{NAME}` of the metadata are filled in. range: lowest and highest number. at_once: requests at a time.
    A picture that was asked about before is not asked about again. One whose answer is none of those asked
    for, or about which the server refuses to say anything, is not scored, once the server has answered for
    others: one odd picture of thousands must not end a run, and would end it again when it is resumed. A
    server that answers for none any more does.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str = QUESTION,
        answer: str = "probability",
        range: tuple[float, float] = (0.0, 10.0),
        token_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 8,
        at_once: int = 8,
        max_tokens: int | None = None,
    ):
        if answer not in ("probability", "number"):
            raise UserError(f"reward vlm: answer: expected probability or number, got {answer!r}")
        lowest, highest = map(float, range)
        if not lowest < highest:
            raise UserError(
                f"reward vlm: range: expected the lower number first, got [{lowest:g}, {highest:g}]"
            )
        if at_once < 1:
            raise UserError(f"reward vlm: at_once: expected at least 1, got {at_once}")
        self.client = JsonClient("vlm", url, token_env, timeout, retries, (500, *TRY_AGAIN))
        self.model, self.question, self.answer = model, question, answer
        self.lowest, self.highest, self.at_once = lowest, highest, at_once
        self.max_tokens = max_tokens or (1 if answer == "probability" else 32)
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self._unanswered = MOST_UNANSWERED  # in a row
        self._warned = False

    def setup(self, device: str) -> None:
        """Raises UserError where the server cannot be reached or has no such model."""
        listed = self.client.ask("GET", "/models")
        found = listed.get("data") if isinstance(listed, dict) else None
        names = [one.get("id") for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        if names and self.model not in names:
            listed = ", ".join(map(str, names[:10]))
            raise self.client.error(f"has no model {self.model!r}, expected one of {listed}")

    def check(self, metadata: list[dict]) -> None:
        for entry in metadata:
            self._asked(entry["prompt"], entry)

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float | None]:
        """Raises UserError where no picture has had an answer yet, or none for long."""
        asked = [self._asked(*of) for of in zip(prompts, metadata, strict=True)]
        with ThreadPoolExecutor(self.at_once) as pool:
            answers = list(pool.map(self._answer, images, asked))
        none = [answer for answer in answers if isinstance(answer, NoAnswer)]
        self._unanswered = self._unanswered + len(none) if len(none) == len(answers) else 0
        if none and self._unanswered >= MOST_UNANSWERED:
            raise none[0]
        if none and not self._warned:
            logger.warning("warning: pictures without an answer are not scored: %s", none[0])
            self._warned = True
        return [None if isinstance(answer, NoAnswer) else answer for answer in answers]

    def _answer(self, image: np.ndarray, question: str) -> float | NoAnswer:
        try:
            return self._one(image, question)
        except NoAnswer as error:
            return error

    def _asked(self, prompt: str, entry: Mapping[str, Any]) -> str:
        def filled(field: re.Match) -> str:
            values = {**entry, "prompt": prompt}
            if field[1] not in values:
                raise UserError(
                    f"reward vlm: question: {{{field[1]}}} is not in the metadata of {prompt!r} "
                    f"(known: {', '.join(values)})"
                )
            return str(values[field[1]])

        return FIELD.sub(filled, self.question)

    def _one(self, image: np.ndarray, question: str) -> float:
        key = hashlib.sha256(repr((image.shape, question)).encode() + image.tobytes()).digest()
        known = self._known.get(key)
        if known is not None:
            return known
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode(image)}"}}
        content = [picture, {"type": "text", "text": question}]
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        if self.answer == "probability":
            request |= {"logprobs": True, "top_logprobs": MOST_ALTERNATIVES}
        answered = self.client.ask("POST", "/chat/completions", request)
        try:
            choice = answered["choices"][0]
            value = self._probability(choice) if self.answer == "probability" else self._number(choice)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            got = shortened(str(answered))
            raise self.client.error(f"expected a chat completion, got {got}", NoAnswer) from None
        self._known[key] = value
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return value

    def _probability(self, choice: Mapping[str, Any]) -> float:
        if not (choice.get("logprobs") or {}).get("content"):
            raise self.client.error(
                "gives no log-probabilities, which answer: probability needs; expected answer: number",
                NoAnswer,
            )
        found = {"yes": 0.0, "no": 0.0}
        for one in choice["logprobs"]["content"][0]["top_logprobs"]:
            word = one["token"].strip().lower()
            if word in found:
                found[word] += math.exp(one["logprob"])
        total = found["yes"] + found["no"]
        if not total > 0:
            said = choice["message"]["content"]
            got = shortened(str(said), 80)
            raise self.client.error(f"expected an answer of yes or no, got {got!r}", NoAnswer)
        return found["yes"] / total

    def _number(self, choice: Mapping[str, Any]) -> float:
        said = choice["message"]["content"]
        number = NUMBER.search(said)
        if number is None or not self.lowest <= float(number[0]) <= self.highest:
            raise self.client.error(
                f"expected a number from {self.lowest:g} to {self.highest:g}, got {shortened(said, 80)!r}",
                NoAnswer,
            )
        return (float(number[0]) - self.lowest) / (self.highest - self.lowest)
