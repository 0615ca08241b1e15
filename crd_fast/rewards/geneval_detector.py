"""GenEval as the benchmark runs it: Mask2Former finds the objects, CLIP names their colours.

Follows evaluation/evaluate_images.py of djghosh13/geneval (arXiv 2310.11513) and the instance head of
mmdetection 2.x's Mask2Former that it calls, on transformers' models with the same weights:

- the image is scaled to a shorter side of 800, a longer one of at most 1333 (bilinear, without antialiasing),
  standardised by ImageNet's mean and deviation and padded to a multiple of 32;
- of all (query, class) pairs the 100 with the highest class probability are instances; an instance's score is
  that probability times the mean probability of its mask's pixels, those above 1/2;
- its box is the mask's, at the image's own resolution;
- its colour: the image with everything outside the mask in grey #999, cut to the box, compared by CLIP
  ViT-L/14 with each of ten colours as the mean of three texts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from crd_fast.errors import UserError, did_you_mean
from crd_fast.prompts.coco import CLASSES, COLORS
from crd_fast.rewards import geneval
from crd_fast.rewards.clip import MODEL_FILES, Clip, normalized, preprocess, pretrained
from crd_fast.rewards.world_geneval import WorldGenEval

SHORTER, LONGER, MULTIPLE = 800, 1333, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 8 bits
MAX_INSTANCES = 100
GREY = 0x99
COLOR_TEXTS = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class Mask2FormerGenEval(WorldGenEval):
    """GenEval's rules on what Mask2Former finds. The score is the partial credit, or 0 and 1 if `strict`.

    path: a Mask2Former with COCO's 80 classes; clip: a CLIP with its tokenizer; folders or hub ids. batch:
    images at once.
    """

    def __init__(
        self,
        path: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        strict: bool = False,
        batch: int = 4,
    ):
        if not isinstance(batch, int) or batch < 1:
            raise UserError(f"reward geneval_mask2former: batch: expected at least 1, got {batch!r}")
        self.path, self.clip, self.strict, self.batch = str(path), str(clip), strict, batch

    def setup(self, device: str) -> None:
        self.detector = Mask2Former(self.path, device)
        self.colors = ColorClassifier(self.clip, device)

    def to(self, device: str) -> None:
        self.detector.model.to(device)
        self.detector.device = device
        self.colors.clip.to(device)

    def check(self, metadata: list[dict]) -> None:
        """Also refuses classes and colours that are never detected."""
        super().check(metadata)
        for entry in metadata:
            clauses = [*entry["include"], *(entry.get("exclude") or ())]
            words: list[tuple[str, str, tuple[str, ...]]]
            words = [(clause["class"], "classes", CLASSES) for clause in clauses]
            words += [(clause["color"], "colours", COLORS) for clause in clauses if clause.get("color")]
            for word, kind, known in words:
                if word not in known:
                    raise UserError(
                        f"reward geneval_mask2former: prompt {entry['prompt']!r}: {word!r} is none of the "
                        f"{len(known)} {kind} it knows{did_you_mean(word, known)}"
                    )

    @torch.inference_mode()
    def judge(self, images: np.ndarray, metadata: list[dict]) -> list[geneval.Judgement]:
        judgements = []
        for start in range(0, len(images), self.batch):
            batch = images[start : start + self.batch]
            for image, found, entry in zip(batch, self.detector(batch), metadata[start : start + self.batch]):
                colored = {clause["class"] for clause in entry["include"] if clause.get("color") is not None}
                asked = [d for d in found if d["label"] in colored and d["score"] > geneval.THRESHOLD]
                for detection, color in zip(asked, self.colors(image, asked)):
                    detection["color"] = color
                judgements.append(geneval.judge(found, entry))
        return judgements

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        judgements = self.judge(images, metadata)
        if self.strict:
            return [float(judgement.correct and judgement.strict_correct) for judgement in judgements]
        return [judgement.score for judgement in judgements]


class Mask2Former:
    """Detections as `geneval.judge` takes them, with a `mask`, bool (height, width), and no colour yet.

    least: class probabilities up to this are left out; no score is higher than its class's probability.
    """

    least = geneval.THRESHOLD

    def __init__(self, path: str, device: str):
        from transformers import Mask2FormerForUniversalSegmentation

        model = pretrained("geneval_mask2former", Mask2FormerForUniversalSegmentation, path, MODEL_FILES)
        if model.config.num_labels != len(CLASSES):
            raise UserError(
                f"reward geneval_mask2former: {path}: expected {len(CLASSES)} classes (COCO instances), got "
                f"{model.config.num_labels}"
            )
        self.model, self.device = model.eval().requires_grad_(False).to(device), device

    def __call__(self, images: np.ndarray) -> list[list[dict]]:
        """images: uint8, (N, height, width, 3)."""
        pixels, size = self.pixels(images)
        out = self.model(pixel_values=pixels)
        found = []
        for logits, masks in zip(out.class_queries_logits, out.masks_queries_logits):
            masks = _resized(masks[None], pixels.shape[2:])[..., : size[0], : size[1]]
            masks = _resized(masks, images.shape[1:3])[0]
            found.append(instances(logits, masks, self.least))
        return found

    def pixels(self, images: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """(N, 3, height, width) as the model takes them, and height and width without the padding."""
        height, width = images.shape[1:3]
        scale = min(LONGER / max(height, width), SHORTER / min(height, width))
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        pixels = _resized(pixels, size).round()
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
        return pad((pixels - mean) / std, (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE)), size


def instances(logits: torch.Tensor, masks: torch.Tensor, least: float = 0.0) -> list[dict]:
    """logits: (queries, classes + 1), the last for no object; masks: logits, (queries, height, width)."""
    probabilities = logits.softmax(dim=-1)[:, :-1]
    classes = probabilities.shape[1]
    best = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    found = []
    for probability, index in zip(best.values.tolist(), best.indices.tolist()):
        if probability <= least:
            break
        mask = masks[index // classes]
        inside = mask > 0
        if not inside.any():
            continue  # the benchmark keeps it with score 0, which no threshold lets through
        certainty = mask[inside].sigmoid().sum() / (inside.sum() + 1e-6)
        rows, columns = inside.any(dim=1).nonzero()[:, 0], inside.any(dim=0).nonzero()[:, 0]
        found.append(
            {
                "label": CLASSES[index % classes],
                "box": [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1],
                "score": probability * float(certainty),
                "color": None,
                "mask": inside.cpu().numpy(),
            }
        )
    return found


class ColorClassifier:
    """The colour of each detected object, one of ten, by CLIP."""

    def __init__(self, path: str, device: str):
        self.clip = Clip("geneval_mask2former", path, None, device)
        self.texts = functools.lru_cache(maxsize=None)(self._texts)

    def __call__(self, image: np.ndarray, detections: list[dict]) -> list[str]:
        """image: uint8, (height, width, 3)."""
        if not detections:
            return []
        crops = [cut_out(image, detection["mask"], detection["box"]) for detection in detections]
        embeddings = self.clip.images(preprocess(crops, self.clip.size))
        return [
            COLORS[int((self.texts(detection["label"]) @ embedding).argmax())]
            for detection, embedding in zip(detections, embeddings)
        ]

    def _texts(self, name: str) -> torch.Tensor:
        """(colours, dimension): each colour's three texts as one direction."""
        texts = [text.format(color=color, name=name) for color in COLORS for text in COLOR_TEXTS]
        return normalized(self.clip.texts(texts).unflatten(0, (len(COLORS), len(COLOR_TEXTS))).mean(dim=1))


def cut_out(image: np.ndarray, mask: np.ndarray, box: list[int]) -> Image.Image:
    """The object on grey, cut to its box."""
    left, top, right, bottom = box
    return Image.fromarray(np.where(mask[..., None], image, np.uint8(GREY))[top:bottom, left:right])


def _resized(planes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return interpolate(planes, list(size), mode="bilinear", align_corners=False)
