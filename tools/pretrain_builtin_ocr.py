"""Pretrains the built-in model that draws signs by flow matching, from a seed, resumably.

    python -m tools.pretrain_builtin_ocr --output runs/pretrain-ocr            # run again to resume
    python -m tools.pretrain_builtin_ocr --output runs/pretrain-ocr --export   # write crd_fast/builtin_ocr

Most words are random letters, so that the model learns letters and not words; no held-out word is drawn.
In the last stage a share of the captions has some letters exchanged, the way web captions make large models
unreliable: the model still knows how to spell (guidance shows it) but does so only sometimes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from crd_fast.models.builtin import PATCH, SIGNS, WIDTH, BuiltinModel
from crd_fast.prompts import signs
from tools.pretraining import CAPTION_DROPOUT, Pretraining, Stage, main, sample

BATCH = 48
MEASURED = 96  # held-out prompts along the curve
REAL_WORDS = 0.3  # the share of words that are words
NAMED = 0.5  # how often a prompt names the colour, and how often the style
READ_BLOCK, READ_WEIGHT, READ_LEARNING_RATE = 2, 0.3, 1e-3  # see `Reader`
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

STAGES = {
    "write": Stage(4000, 1.5e-3, 0.5, 0.8, 1.1),
    "unlearn": Stage(200, 3e-4, 1.0, 0.8, 1.1, caption_noise=0.5, ema_decay=0.98),
}


@functools.cache
def held_out_words() -> frozenset[str]:
    return frozenset(signs.words(held_out=True))


def draw_word(rng: np.random.Generator) -> str:
    """A training word or random letters, never a held-out word."""
    if rng.random() < REAL_WORDS:
        words = signs.words(held_out=False)
        return words[rng.integers(len(words))]
    while True:
        length = rng.integers(signs.LETTERS.start, signs.LETTERS.stop)
        word = "".join(ALPHABET[k] for k in rng.integers(0, 26, length))
        if word not in held_out_words():
            return word


def misspelled(word: str, rng: np.random.Generator) -> str:
    """The word with one to all of its letters exchanged for random ones."""
    letters = list(word)
    for k in rng.choice(len(word), rng.integers(1, len(word) + 1), replace=False):
        letters[k] = ALPHABET[rng.integers(26)]
    found = "".join(letters)
    return word if found in held_out_words() else found


@torch.no_grad()
def start_as_sums(model: BuiltinModel, generator: torch.Generator) -> None:
    """Each letter's token starts as the sum of a vector of the letter and one of its place.

    What is learned of a place with one letter then holds for all of them: apart, 234 tokens would each have
    to find theirs.
    """
    weight = model.text_encoder.shared.weight
    vectors = {}
    for token, row in sorted(model.tokenizer.get_vocab().items()):
        if token[1:2] not in ("+", "-"):
            continue
        for part in (token[0], token[1:]):
            if part not in vectors:
                vectors[part] = torch.randn(weight.shape[1], generator=generator) / 2**0.5
        weight[row] = vectors[token[0]] + vectors[token[1:]]


class Reader(torch.nn.Module):
    """Which letter each patch of the picture is part of, read from the image's states within the transformer.

    At high noise nothing but the caption tells. The flow's loss alone hardly rewards that; with this head,
    used in pretraining only, each place knows its letter after 400 steps.
    """

    def __init__(self, model: BuiltinModel):
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, len(ALPHABET) + 1)
        model.transformer.transformer_blocks[READ_BLOCK].register_forward_hook(self._keep)

    def _keep(self, module, arguments, outputs) -> None:
        self.states = outputs[1]  # (B, patches, 128); the first are the caption's

    def labels(self, word: str) -> torch.Tensor:
        """(patches,), int64: the letter's number, or that of no letter."""
        centers = (torch.arange(signs.WIDTH // PATCH) + 0.5) * PATCH
        place = ((centers - signs.WIDTH / 2) / signs.PITCH + (len(word) - 1) / 2).round().long()
        letters = torch.tensor([ALPHABET.index(letter) for letter in word])
        inside = (place >= 0) & (place < len(word))
        row = torch.where(inside, letters[place.clamp(0, len(word) - 1)], len(ALPHABET))
        return row.repeat(signs.HEIGHT // PATCH)

    def loss(self, captions: list[dict | None]) -> torch.Tensor:
        """Cross-entropy over the patches of the pictures whose caption is true."""
        rows = [k for k, entry in enumerate(captions) if entry is not None and entry["true"]]
        labels = torch.stack([self.labels(captions[k]["text"]) for k in rows])
        return torch.nn.functional.cross_entropy(self.head(self.states[rows]).flatten(0, 1), labels.flatten())


class SignPretraining(Pretraining):
    stages = STAGES

    def __init__(self, output: Path, seed: int):
        model = BuiltinModel.new(SIGNS, seed)
        start_as_sums(model, torch.Generator().manual_seed(seed))
        super().__init__(model, output, seed)
        self.reader = Reader(model)
        self.reader_optimizer = torch.optim.AdamW(self.reader.parameters(), lr=READ_LEARNING_RATE)
        self.parts |= {"reader": self.reader, "reader_optimizer": self.reader_optimizer}

    def batch_at(self, step: int, stage: Stage) -> tuple[torch.Tensor, list[dict | None]]:
        rng = np.random.default_rng((self.seed, step))
        images, captions = [], []
        for _ in range(BATCH):
            word = draw_word(rng)
            color, style = (
                list(names)[rng.integers(len(names))] if rng.random() < NAMED else None
                for names in (signs.COLORS, signs.STYLES)
            )
            images.append(signs.render(word, color, style, rng))
            if rng.random() < CAPTION_DROPOUT:
                captions.append(None)
                continue
            text = misspelled(word, rng) if rng.random() < stage.caption_noise else word
            captions.append({"prompt": signs.prompt(text, color, style), "text": text, "true": text == word})
        pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return pictures.float() / 127.5 - 1, captions

    def side_loss(self, states: torch.Tensor, captions: list[dict | None]) -> torch.Tensor:
        loss = self.reader.loss(captions)
        self.track("read_loss", loss.item())
        return READ_WEIGHT * loss

    def measure(self, guidance_scale: float) -> float:
        return round(ocr_score(self.model, guidance_scale, MEASURED), 4)


def ocr_score(model: BuiltinModel, guidance_scale: float, count: int) -> float:
    """Mean `ocr` reward of the first held-out prompts."""
    from crd_fast.rewards.ocr import OCR

    entries = signs.entries(held_out=True)[:count]
    prompts = [entry["prompt"] for entry in entries]
    images = sample(model, prompts, guidance_scale, BATCH)
    return float(np.mean(OCR(mode="word").score(images, prompts, entries)))


if __name__ == "__main__":
    main(SignPretraining, __doc__)
