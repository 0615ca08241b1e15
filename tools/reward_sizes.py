"""Parameters and workspace of the networks that score pictures: `python -m tools.reward_sizes [NAME ...]`.

The figures of `crd_fast/plan/rewards.py`: transformers' classes with the published models' sizes and random
weights, in float32, without gradient. The CLIPs run on fake tensors; BLIP and Mask2Former look at values
while they are made and run for real, on two pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crd_fast.plan.rewards import Network, measured

SIDE = 224  # pixels, of what a scorer's vision tower looks at
DETECTOR_SIDE = 800


def vit(width: int, layers: int, heads: int, **more) -> dict:
    """Sizes of one tower."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads} | more


CLIPS = {  # the picture's tower, the text's, the embedding's width
    "ViT-H/14": (vit(1280, 32, 16, patch_size=14), vit(1024, 24, 16), 1024),
    "ViT-B/32": (vit(768, 12, 12, patch_size=32), vit(512, 12, 8), 512),
    "ViT-L/14": (vit(1024, 24, 16, patch_size=14), vit(768, 12, 12), 768),
}


def clip(name: str) -> list[tuple[torch.nn.Module, Callable]]:
    from transformers import CLIPConfig, CLIPModel

    vision, text, width = CLIPS[name]
    projected = {"projection_dim": width}
    config = CLIPConfig(vision_config=vision | projected, text_config=text | projected, projection_dim=width)
    return [(CLIPModel(config), lambda m, n: m.vision_model(pixel_values=torch.zeros(n, 3, SIDE, SIDE)))]


def aesthetic() -> list[tuple[torch.nn.Module, Callable]]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    vision, _, width = CLIPS["ViT-L/14"]
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=width))
    return [(model, lambda m, n: m(pixel_values=torch.zeros(n, 3, SIDE, SIDE)))]


def blip() -> list[tuple[torch.nn.Module, Callable]]:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    eyes = BlipVisionModel(BlipVisionConfig(**vit(1024, 24, 16, patch_size=16, image_size=SIDE)))
    sizes = vit(768, 12, 12, vocab_size=30524, encoder_hidden_size=1024, max_position_embeddings=512)
    reader = BlipTextModel(BlipTextConfig(**sizes), add_pooling_layer=False)
    tokens, seen = 35, 1 + (SIDE // 16) ** 2

    def read(model: torch.nn.Module, n: int) -> object:
        return model(
            input_ids=torch.ones(n, tokens, dtype=torch.long),
            attention_mask=torch.ones(n, tokens, dtype=torch.long),
            encoder_hidden_states=torch.zeros(n, seen, 1024),
        )

    return [(eyes, lambda m, n: m(pixel_values=torch.zeros(n, 3, SIDE, SIDE))), (reader, read)]


def mask2former() -> list[tuple[torch.nn.Module, Callable]]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    detector = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80))
    colors = clip("ViT-L/14")
    side = DETECTOR_SIDE
    return [(detector, lambda m, n: m(pixel_values=torch.zeros(n, 3, side, side))), *colors]


MODELS: dict[
    str, tuple[Callable[[], list], bool, int]
] = {  # how it is made, on fake tensors, pictures at once
    "pickscore": (lambda: clip("ViT-H/14"), True, 32),
    "clipscore": (lambda: clip("ViT-B/32"), True, 32),
    "aesthetic": (aesthetic, True, 32),
    "hpsv2": (lambda: clip("ViT-H/14"), True, 32),
    "imagereward": (blip, False, 2),
    "geneval_mask2former": (mask2former, False, 2),
}


def measure(name: str) -> Network:
    """Of the published model."""
    make, fake, pictures = MODELS[name]
    with FakeTensorMode() if fake else nullcontext(), torch.no_grad():
        return measured(make(), pictures)


def main() -> None:
    for name in sys.argv[1:] or MODELS:
        print(json.dumps({"name": name, **vars(measure(name))}))


if __name__ == "__main__":
    main()
