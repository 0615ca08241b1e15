"""Scorers that were trained on what people prefer, with the preprocessing and the scale of their authors.

    rewards:      {pickscore: 1.0}                                    # from the hub
    eval_rewards: {imagereward: {path: /models/ImageReward, tokenizer: /models/bert-base-uncased}}

Each takes `path` (a local folder, the one file where there is one, or a hub id; without it what its authors
published), `tokenizer` (the same; without it the folder of `path`, or the hub's) and `batch`, images at once.
`setup` loads weights, in float32; `to` moves them, as judges wait on the host between evaluations.

| name | model | score of an image | source |
|---|---|---|---|
| pickscore | ViT-H/14 | exp(logit_scale) cos(text, image) | arXiv 2305.01569 |
| clipscore | ViT-B/32 | 2.5 max(cos("A photo depicts " + text, image), 0) | arXiv 2104.08718 |
| aesthetic | ViT-L/14 | affine head on the embedding | LAION's improved aesthetic predictor |
| hpsv2 | ViT-H/14, v2.1 | cos(text, image) | arXiv 2306.09341 |
| imagereward | BLIP, ViT-L/16 | (affine head - mean) / std | arXiv 2304.05977 |

Details follow the authors' repositories: yuvalkirstain/PickScore, jmhessel/clipscore,
christophschuhmann/improved-aesthetic-predictor, tgxs002/HPSv2 (img_score.py), THUDM/ImageReward.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate, pad

from crd_fast.errors import UserError, reason_of
from crd_fast.rewards.clip import (
    MODEL_FILES,
    Clip,
    load_tokenizer,
    preprocess,
    pretrained,
    standardized,
    warn_of_cut,
    weights_file,
)
from crd_fast.rewards.conversions import blip_from_image_reward, clip_from_open_clip

VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class _Scorer:
    """Batches over the images. Subclasses have `name`, `setup`, `to` and `_score(images, prompts)`."""

    name: str
    hub: str  # where the weights are published
    hub_tokenizer: str | None = None  # None: it is where the model is

    def __init__(self, path: str | None = None, tokenizer: str | None = None, batch: int = 32):
        if not isinstance(batch, int) or batch < 1:
            raise UserError(f"reward {self.name}: batch: expected at least 1, got {batch!r}")
        self.path, self.batch = str(path or self.hub), batch
        local = Path(self.path).expanduser().is_dir()
        self.tokenizer = str(tokenizer or (self.path if local else self.hub_tokenizer or self.path))

    @torch.inference_mode()
    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            scores += self._score(images[part], list(prompts[part])).float().cpu().tolist()
        return scores

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        raise NotImplementedError


class _ClipScorer(_Scorer):
    """cos(text, image), each text encoded once in a batch."""

    prefix = ""
    clip: Clip

    def setup(self, device: str) -> None:
        self.clip = Clip(self.name, self.path, self.tokenizer, device)

    def to(self, device: str) -> None:
        self.clip.to(device)

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        return preprocess(images, self.clip.size)

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.clip.texts([self.prefix + prompt for prompt in distinct])
        texts = texts[[distinct[prompt] for prompt in prompts]]
        return (self.clip.images(self._pixels(images)) * texts).sum(dim=-1)


class PickScore(_ClipScorer):
    """exp(logit_scale) * cos(text, image). The published repository has no tokenizer; ViT-H/14's is used."""

    name = "pickscore"
    hub, hub_tokenizer = "yuvalkirstain/PickScore_v1", VIT_H_14

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        return self.clip.model.logit_scale.exp() * super()._score(images, prompts)


class CLIPScore(_ClipScorer):
    """2.5 * max(cos("A photo depicts " + prompt, image), 0), CLIP-S of the paper, without references."""

    name, prefix = "clipscore", "A photo depicts "
    hub = "openai/clip-vit-base-patch32"

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        return 2.5 * super()._score(images, prompts).clamp(min=0)


class Aesthetic(_Scorer):
    """LAION's improved aesthetic predictor: of the image alone.

    Five linear layers, 768-1024-128-64-16-1, with dropout and nothing else between them (so affine), on the
    normalised image embedding of OpenAI's ViT-L/14. head: `sac+logos+ava1-l14-linearMSE.pth` or a copy of it;
    a single linear layer (`weight`, `bias`), as LAION's first predictor has, is taken as well.
    """

    name, hub = "aesthetic", "openai/clip-vit-large-patch14"
    head_file = "aesthetic-model.pth"  # the name of the hub's copy
    head_source = (
        "sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor on GitHub"
    )

    def __init__(
        self,
        path: str | None = None,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        batch: int = 32,
    ):
        super().__init__(path, None, batch)
        self.head_path = str(head)

    def setup(self, device: str) -> None:
        from transformers import CLIPVisionModelWithProjection

        state = weights_file(self.name, self.head_path, self.head_file, self.head_source)
        self.head = linear_layers(self.name, state).to(device)
        model = pretrained(self.name, CLIPVisionModelWithProjection, self.path, MODEL_FILES)
        self.model = model.eval().requires_grad_(False).to(device)

    def to(self, device: str) -> None:
        self.model.to(device)
        self.head.to(device)

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        pixels = preprocess(images, self.model.config.image_size).to(self.model.device)
        embeddings = self.model(pixel_values=pixels).image_embeds
        return self.head(embeddings / embeddings.norm(dim=-1, keepdim=True))[:, 0]


class HPSv2(_ClipScorer):
    """cos(text, image) of HPS v2.1, OpenCLIP's ViT-H-14 fine-tuned on preferences.

    path: `HPS_v2.1_compressed.pt`, its folder, or the hub id that has it. The authors use OpenCLIP; here the
    same weights run in transformers' class. Preprocessing as theirs with torchvision >= 0.17: the
    longer side to 224 (bicubic with antialiasing, on [0, 1]), black bars to a square. Their tokenizer also
    mends broken Unicode (ftfy) and HTML entities, which prompts rarely have.
    """

    name, file = "hpsv2", "HPS_v2.1_compressed.pt"
    hub, hub_tokenizer = "xswu/HPSv2", VIT_H_14

    def setup(self, device: str) -> None:
        state = weights_file(self.name, self.path, self.file, f"on the hub as {self.hub}")
        ending = load_tokenizer(self.name, self.tokenizer).eos_token_id
        model = converted(self.name, self.path, lambda: clip_from_open_clip(state, ending))
        self.clip = Clip(self.name, self.path, self.tokenizer, device, model)

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        scale = self.clip.size / max(pixels.shape[2:])
        if scale != 1:
            size = [round(side * scale) for side in pixels.shape[2:]]
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True)
        down, right = (self.clip.size - side for side in pixels.shape[2:])
        return standardized(pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2)))


class ImageReward(_Scorer):
    """BLIP reads the prompt while it looks at the image; a head on the first token's state, standardised.

    path: `ImageReward.pt`, its folder, or the hub id that has it. tokenizer: bert-base-uncased. The authors'
    package (`pip install image-reward`) needs transformers 4; here the same weights run in today's classes.
    """

    name, file = "imagereward", "ImageReward.pt"
    hub, hub_tokenizer = "THUDM/ImageReward", "google-bert/bert-base-uncased"
    mean, std = 0.16717362830052426, 1.0333394966054072  # the authors', of the raw score on their data
    length = 35  # tokens

    def setup(self, device: str) -> None:
        state = weights_file(self.name, self.path, self.file, f"on the hub as {self.hub}")
        blip, head = (
            {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
            for part in ("blip.", "mlp.")
        )
        models = converted(self.name, self.path, lambda: blip_from_image_reward(blip))
        self.vision, self.text = (model.eval().requires_grad_(False).to(device) for model in models)
        self.head = linear_layers(self.name, head).to(device)
        self.tokens = load_tokenizer(self.name, self.tokenizer)
        self.cut: set[str] = set()

    def to(self, device: str) -> None:
        self.vision.to(device)
        self.text.to(device)
        self.head.to(device)

    def _score(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        pixels = preprocess(images, self.vision.config.image_size).to(self.vision.device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        warn_of_cut(self.name, self.tokens, prompts, self.length, self.cut)
        tokens = self.tokens(
            prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.vision.device)
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        return (self.head(read)[:, 0] - self.mean) / self.std


def linear_layers(reward: str, state: dict[str, torch.Tensor]) -> nn.Sequential:
    """The layers in `layers.N.*`, or the single one in `weight`, `bias`, in float32."""
    found = (re.fullmatch(r"layers\.(\d+)\.weight", name) for name in state)
    numbers = sorted(int(match.group(1)) for match in found if match)
    layers = nn.Sequential()
    try:
        for prefix in [f"layers.{number}." for number in numbers] or [""]:
            weight, bias = state[f"{prefix}weight"], state[f"{prefix}bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
    except KeyError as error:
        raise UserError(f"reward {reward}: expected {error.args[0]!r} among the head's weights") from None
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    if widths[-1] != 1 or any(layer.in_features != width for layer, width in zip(layers, widths)):
        raise UserError(f"reward {reward}: expected linear layers down to one number, got widths {widths}")
    return layers.requires_grad_(False)


def converted(reward: str, path: str, convert):
    try:
        return convert()
    except (KeyError, RuntimeError, ZeroDivisionError, ValueError) as error:
        reason = reason_of(error)
        raise UserError(f"reward {reward}: {path}: expected this scorer's own weights: {reason}") from None
