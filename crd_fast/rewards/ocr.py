"""OCR as a reward: is the text that the prompt puts in quotation marks in the picture?

Recognition is PaddleOCR's own models through `rapidocr` and `onnxruntime`, on the CPU; the models come inside
the rapidocr wheel and nothing is downloaded. `ocr` compares what was read with what was wanted; `ocr_dense`
asks the recogniser how likely the wanted text is, which tells pictures apart where the hard score is flat.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch.nn.functional import ctc_loss

from crd_fast.errors import MissingPackage, UserError

MODES = ("scene", "word")
DETECTOR_SIDE = 736  # rapidocr's default
HEIGHT = 48  # pixels that the recogniser's input is high
WIDTH_STEP, MIN_WIDTH = 80, 160  # inputs are padded to a multiple, so that few shapes occur
BATCH_PIXELS = 16 * HEIGHT * 320  # of one run of the recogniser
TINY = 1e-30  # the least probability that is told from none
# Straight marks stand for inches after a digit, and so do those that an editor made of them.
_QUOTED = re.compile(
    r"""(?<!\d)["”＂]([^"“”„＂]*)["“”＂]|[“„]([^"“”„＂]*)["“”＂]"""
    r"|«([^«»]*)»|»([^«»]*)«|‹([^‹›]*)›|›([^‹›]*)‹|「([^「」]*)」|『([^『』]*)』"
)
_HALF_QUOTED = re.compile(r"""(?<!\d)["”＂]|[“„«»‹›「『]""")  # where the text is cut off
# Apostrophes stand within words, at the end of a plural, before a decade, and around an n before other marks.
_SINGLY_QUOTED = re.compile(
    r"(?<!\w)['‘‚]{1,2}(?=\S)(?!\d0s\b)(?!n['’] .*(?<!\w)['‘‚]\w)(.+?)(?<=\S)['’‘](?!\w)"
)
_ESCAPED = re.compile(r"""\\(["'])""")  # as in a file of code
_ALIKE = {"'": "‘’‚‛ʼ′`´", '"': "“”„‟«»″", "-": "‐‑‒–—―−", "/": "⁄"}
_FOLDED = str.maketrans({other: plain for plain, others in _ALIKE.items() for other in others})


def target_text(prompt: str) -> str:
    """What stands in the first pair of quotation marks, of single ones where there are no others.

    “English”, „Deutsch“, «français» and 「日本語」 count as "straight" ones do. Raises UserError if the
    prompt has none.
    """
    plain = _ESCAPED.sub(r"\1", prompt)
    found = _QUOTED.search(plain)
    if not found and not _HALF_QUOTED.search(plain):
        found = _SINGLY_QUOTED.search(plain)
    text = (found[found.lastindex or 0] if found else "").strip()
    if not normalized(text):
        shown = prompt if len(prompt) <= 200 else f"{prompt[:95]} ... {prompt[-95:]}"
        raise UserError(
            f'reward ocr: expected a text in double quotes, like a sign that says "CAT", got {shown!r}'
        )
    return text


def normalized(text: str) -> str:
    """Without white space, in lower case, with one character for what looks alike: Unicode's NFKC (full-width
    letters, ligatures, fractions), and all apostrophes, quotation marks and dashes by their ASCII forms."""
    # twice: an acute accent by itself is a space and an accent to NFKC
    text = unicodedata.normalize("NFKC", text.translate(_FOLDED)).translate(_FOLDED).lower()
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def text_score(read: str, wanted: str) -> float:
    """1 - edit distance / length of what is wanted, at least 0; 1 if it is contained. Both as `normalized`.

    The distance is Levenshtein's, so that whatever else stands in the picture costs at most the whole score.
    """
    if wanted in read:
        return 1.0
    return max(0.0, 1 - Levenshtein.distance(read, wanted) / len(wanted))


class Reader:
    """PaddleOCR's detector and recogniser, each with `threads` threads of onnxruntime.

    side: pixels; a picture whose shorter side is less is enlarged for the detector.
    Raises UserError if a package or its models are missing.
    """

    def __init__(self, threads: int = 1, side: int = DETECTOR_SIDE):
        try:
            import rapidocr
            from rapidocr.ch_ppocr_rec import TextRecognizer  # noqa: F401
        except ImportError as error:
            raise MissingPackage(
                f"reward ocr: {error.name} is missing; pip install 'crd-fast[ocr]'"
            ) from None
        models = Path(rapidocr.__file__).parent / "models"
        files = {part: sorted(models.glob(f"*_{part}_*.onnx")) for part in ("det", "rec")}
        for part, found in files.items():
            if not found:
                raise UserError(
                    f"reward ocr: expected *_{part}_*.onnx in {models}; pip install 'rapidocr>=3.10'"
                )
        self._engine = rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.limit_side_len": side,
                # named, so that nothing is ever downloaded in their place
                "Det.model_path": str(files["det"][0]),
                "Rec.model_path": str(files["rec"][0]),
            }
        )
        from rapidocr.main import RapidOCRError

        self._nothing_found = RapidOCRError

    @functools.cached_property
    def _recognizer(self):
        return self._engine._load_rec_model()

    @functools.cached_property
    def characters(self) -> list[str]:
        """The recogniser's classes; class 0 is the blank of CTC."""
        return self._recognizer.postprocess_op.character

    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        """The lines of text that the detector finds, in reading order. image: uint8 RGB (H, W, 3)."""
        resized, record = self._engine.preprocess_img(np.ascontiguousarray(image[..., ::-1]))
        try:
            found, _ = self._engine.detect_and_crop(resized, record)
        except self._nothing_found:
            return []
        return [crop[..., ::-1] for crop in found]

    def probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The recogniser's output for pictures of one line each: float32 (frames, classes), rows sum to 1.

        images: uint8 RGB (H, W, 3) of any sizes. A picture's frames depend on its own size alone, and
        pictures of one padded width share a run of the network.
        """
        by_width: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            width = math.ceil(HEIGHT * image.shape[1] / image.shape[0])
            padded = max(MIN_WIDTH, -(-width // WIDTH_STEP) * WIDTH_STEP)
            by_width.setdefault(padded, []).append(i)
        outputs: list[np.ndarray] = [np.empty(0)] * len(images)
        for width, members in by_width.items():
            count = max(1, BATCH_PIXELS // (HEIGHT * width))
            for start in range(0, len(members), count):
                chosen = members[start : start + count]
                inputs = [
                    self._recognizer.resize_norm_img(images[i][..., ::-1], width / HEIGHT) for i in chosen
                ]
                for i, output in zip(chosen, self._recognizer.session(np.stack(inputs))):
                    outputs[i] = output
        return outputs

    def read_lines(self, images: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """Text and confidence (mean over its characters, 0 if there is none) of pictures of one line each."""
        read = []
        for probabilities in self.probabilities(images):
            text, confidence = self._recognizer.postprocess_op(probabilities[None])[0][0]
            read.append((text, float(confidence)))
        return read


@functools.cache
def reader(threads: int, side: int) -> Reader:
    """One reader for the same settings: `ocr` and `ocr_dense` share the networks."""
    return Reader(threads, side)


class TextReward(ABC):
    """The rule of `ocr`, for whatever reads the text.

    mode: `word` takes the picture for one line, `scene` finds them. Read with less than `confidence` a line
    counts as not read.
    """

    mode: str
    confidence: float

    @abstractmethod
    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        """The lines of text in a picture, in reading order. All are uint8 RGB (H, W, 3)."""

    @abstractmethod
    def read_lines(self, images: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """Text and confidence (0 if there is no text) of pictures of one line each."""

    def read(self, images: np.ndarray) -> list[str]:
        """The text of each picture; lines are joined by spaces. images: uint8 (N, H, W, 3)."""
        owners, crops = lines_of(self.crops, images, self.mode)
        texts: list[list[str]] = [[] for _ in images]
        for owner, (text, confidence) in zip(owners, self.read_lines(crops)):
            if confidence >= self.confidence:
                texts[owner].append(text)
        return [" ".join(lines) for lines in texts]

    def check(self, metadata: list[dict]) -> None:
        """Raises UserError for the first prompt without a text in double quotes."""
        for entry in metadata:
            target_text(entry["prompt"])

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        wanted = [normalized(target_text(prompt)) for prompt in prompts]
        return [text_score(normalized(read), text) for read, text in zip(self.read(images), wanted)]


class OCR(TextReward):
    """1 - edit distance / length between what is read and what the prompt puts in quotation marks.

    Both as `normalized`; 1 if the wanted text is contained; never below 0 (the rule of
    Flow-GRPO, arXiv 2505.05470). mode: `scene` finds the lines of text in the whole picture and reads them in
    order; `word` takes the picture for one line and is many times faster. A line read with less than
    `confidence` counts as not read, so that blank and noisy pictures score 0. threads: of onnxruntime. side:
    pixels that the shorter side of a smaller picture is enlarged to before lines are looked for; that takes
    most of the time of `scene`, and with large letters 320 does as well.
    """

    def __init__(
        self, mode: str = "scene", confidence: float = 0.5, threads: int = 1, side: int = DETECTOR_SIDE
    ):
        check_settings("ocr", mode, side, threads, confidence)
        self.mode, self.confidence = mode, confidence
        self.reader = reader(threads, side)

    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        return self.reader.crops(image)

    def read_lines(self, images: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        return self.reader.read_lines(images)


class OCRDense:
    """How likely the recogniser finds the wanted text: scale / (scale - m), between 0 and 1, never flat.

    m <= 0 is the exact log-likelihood (nats) of the text under the recogniser's CTC output, per character
    (`reduction: mean`) or of the whole text (`total`). 1 where the text is certain, 1/2 where m = -scale, and
    still falling where the text is hopeless; 0 where the picture has too few frames for the text at all.
    Upper and lower case are one class and a space is as good as a blank, as in `ocr`. mode `scene`: the most
    likely of the lines that are found, the whole picture where none is; meant for a text in one line.
    """

    def __init__(
        self,
        mode: str = "word",
        reduction: str = "mean",
        scale: float = 5.0,
        threads: int = 1,
        side: int = DETECTOR_SIDE,
    ):
        check_settings("ocr_dense", mode, side, threads)
        if reduction not in ("mean", "total"):
            raise UserError(f"reward ocr_dense: reduction: expected mean or total, got {reduction!r}")
        if not 0 < scale < math.inf:
            raise UserError(f"reward ocr_dense: scale: expected a number > 0, got {scale!r}")
        self.mode, self.reduction, self.scale = mode, reduction, scale
        self.reader = reader(threads, side)
        self.classes, self.fold = folded_classes(self.reader.characters)

    def check(self, metadata: list[dict]) -> None:
        """Raises UserError for the first prompt without a text that the recogniser can spell."""
        for entry in metadata:
            self.spell(entry["prompt"])

    def spell(self, prompt: str) -> list[int]:
        """The classes of the wanted text."""
        text = target_text(prompt)
        unknown = [character for character in normalized(text) if character not in self.classes]
        if unknown:
            raise UserError(f"reward ocr_dense: the recogniser does not know {unknown[0]!r} in {text!r}")
        return [self.classes[character] for character in normalized(text)]

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        owners, crops = lines_of(self.reader.crops, images, self.mode)
        for i in sorted(set(range(len(images))) - set(owners)):
            owners.append(i)
            crops.append(images[i])
        best = [-math.inf] * len(images)
        for owner, probabilities in zip(owners, self.reader.probabilities(crops)):
            target = self.spell(prompts[owner])
            log_likelihood = self.log_likelihood(probabilities, target)
            if self.reduction == "mean":
                log_likelihood /= len(target)
            best[owner] = max(best[owner], log_likelihood)
        return [self.scale / (self.scale - min(value, 0.0)) for value in best]

    def log_likelihood(self, probabilities: np.ndarray, target: list[int]) -> float:
        """CTC log-likelihood of the folded classes `target`, from the recogniser's (frames, classes).

        Probabilities of classes that are one character when case is ignored are added, and the space adds to
        the blank. -inf if there are too few frames.
        """
        kinds = [0, *sorted(set(target))]
        folded = [probabilities[:, self.fold[kind]].sum(axis=1, dtype=np.float64) for kind in kinds]
        log_probabilities = torch.from_numpy(np.log(np.maximum(np.stack(folded, axis=1), TINY)))
        classes = torch.tensor([kinds.index(kind) for kind in target])
        frames, letters = torch.tensor(len(log_probabilities)), torch.tensor(len(target))
        return -ctc_loss(log_probabilities, classes, frames, letters, reduction="sum").item()


def check_settings(name: str, mode: str, side: int, threads: int = 1, confidence: float = 0.5) -> None:
    """Raises UserError for what a reader of this name cannot be made with."""
    if mode not in MODES:
        raise UserError(f"reward {name}: mode: expected scene or word, got {mode!r}")
    if not isinstance(threads, int) or threads < 1:
        raise UserError(f"reward {name}: threads: expected at least 1, got {threads!r}")
    if not isinstance(side, int) or side < 32:
        raise UserError(f"reward {name}: side: expected at least 32 pixels, got {side!r}")
    if not 0 <= confidence <= 1:
        raise UserError(f"reward {name}: confidence: expected 0 to 1, got {confidence!r}")


def lines_of(
    crops: Callable[[np.ndarray], list[np.ndarray]], images: np.ndarray, mode: str
) -> tuple[list[int], list[np.ndarray]]:
    """The pictures of single lines, and which image each is from. crops: finds those of one image."""
    if mode == "word":
        return list(range(len(images))), list(images)
    found = [(i, crop) for i, image in enumerate(images) for crop in crops(image)]
    return [i for i, _ in found], [crop for _, crop in found]


def folded_classes(characters: Sequence[str]) -> tuple[dict[str, int], dict[int, list[int]]]:
    """Classes when case is ignored: the folded class of each character, and the classes it is made of.

    The folded class of the blank is 0; it takes white space in. A class whose lower case is several
    characters stays out.
    """
    classes: dict[str, int] = {}
    fold: dict[int, list[int]] = {0: [0]}
    for i, character in enumerate(characters[1:], start=1):
        if not character.strip():
            fold[0].append(i)
        elif len(character.lower()) == 1:
            folded = classes.setdefault(character.lower(), i)
            fold.setdefault(folded, []).append(i)
    return classes, fold
