"""Weights published for other packages, for transformers' classes of the same architecture.

What a file does not say (numbers of heads) is that of the one published model. Raises KeyError or
RuntimeError where the names or shapes are another model's.
"""

from __future__ import annotations

import re

import torch

OPEN_CLIP_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VIT_H_14_HEADS = 16  # of both towers
BLIP_HEAD = 64  # width of an attention head, of both its towers


def clip_from_open_clip(state: dict[str, torch.Tensor], eos_token_id: int):
    """OpenCLIP's ViT-H-14 as a CLIPModel, float32. Sizes are read off the weights."""
    from transformers import CLIPConfig, CLIPModel

    patches, side = state["visual.conv1.weight"], len(state["visual.positional_embedding"]) - 1
    vocabulary, width = state["token_embedding.weight"].shape
    dimension = state["text_projection"].shape[1]
    common = {"hidden_act": "gelu", "projection_dim": dimension, "num_attention_heads": VIT_H_14_HEADS}
    vision = common | {
        "hidden_size": patches.shape[0],
        "patch_size": patches.shape[-1],
        "image_size": patches.shape[-1] * round(side**0.5),
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _layers(state, r"visual\.transformer\.resblocks\.(\d+)\."),
    }
    text = common | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": len(state["positional_embedding"]),
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _layers(state, r"transformer\.resblocks\.(\d+)\."),
        "eos_token_id": eos_token_id,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dimension))
    model.load_state_dict(_from_open_clip(state))
    return model


def _from_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(\w+)", name)
        packed = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", name)
        if packed:
            tower, layer, kind = packed.groups()
            for part, third in zip("qkv", value.chunk(3)):
                renamed[f"{_tower(tower)}.encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] = third
        elif block:
            tower, layer, part, kind = block.groups()
            renamed[f"{_tower(tower)}.encoder.layers.{layer}.{OPEN_CLIP_LAYER[part]}.{kind}"] = value
        else:
            transposed = name in ("visual.proj", "text_projection")  # OpenCLIP multiplies from the right
            renamed[OPEN_CLIP_NAMES[name]] = value.T if transposed else value
    return renamed


def _tower(visual: str | None) -> str:
    return "vision_model" if visual else "text_model"


def blip_from_image_reward(state: dict[str, torch.Tensor]):
    """ImageReward's BLIP (ViT-L/16, and a BERT that attends to it) as BlipVisionModel and BlipTextModel.

    state: names without `blip.`. Its projections to BLIP's contrastive space are not used by the reward.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    patches, positions = state["visual_encoder.patch_embed.proj.weight"], state["visual_encoder.pos_embed"]
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=patches.shape[0],
            patch_size=patches.shape[-1],
            image_size=patches.shape[-1] * round((positions.shape[1] - 1) ** 0.5),
            intermediate_size=len(state["visual_encoder.blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=_layers(state, r"visual_encoder\.blocks\.(\d+)\."),
            num_attention_heads=patches.shape[0] // BLIP_HEAD,
            layer_norm_eps=1e-6,
        )
    )
    vision.load_state_dict(
        {
            _vision_name(name.removeprefix("visual_encoder.")): value
            for name, value in state.items()
            if name.startswith("visual_encoder.")
        }
    )
    vocabulary, width = state["text_encoder.embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=patches.shape[0],
            intermediate_size=len(state["text_encoder.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(state, r"text_encoder\.encoder\.layer\.(\d+)\."),
            num_attention_heads=width // BLIP_HEAD,
            max_position_embeddings=len(state["text_encoder.embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
        ),
        add_pooling_layer=False,
    )
    text.load_state_dict(
        {
            name.removeprefix("text_encoder."): value
            for name, value in state.items()
            if name.startswith("text_encoder.") and not name.endswith("embeddings.position_ids")
        }
    )
    return vision, text


def _vision_name(name: str) -> str:
    for old, new in (
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj.", "embeddings.patch_embedding."),
        ("norm.", "post_layernorm."),
    ):
        if name.startswith(old):
            return name.replace(old, new, 1)
    for old, new in (
        ("blocks.", "encoder.layers."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".attn.proj.", ".self_attn.projection."),
    ):
        name = name.replace(old, new, 1)
    return name


def _layers(state: dict, pattern: str) -> int:
    return len({found.group(1) for name in state if (found := re.match(pattern, name))})
