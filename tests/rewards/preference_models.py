"""Models with the published scorers' names of weights, smaller, for computations apart from the package."""

import math

import torch
from torch import nn
from torch.nn import functional as F

SIDE = 32


def randomized(model, seed):
    """Weights large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = random_weight(name, parameter.shape, generator)
    return model.eval()


def random_weight(name, shape, generator):
    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise  # of norms; biases
    return 1.5 * noise / math.prod(shape[1:]) ** 0.5


def aesthetic_head(width):
    """The layers of christophschuhmann/improved-aesthetic-predictor."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    ).eval()  # fmt: skip


class OpenClip(nn.Module):
    """OpenCLIP's ViT with its names of the weights, smaller: 16 heads, as ViT-H-14 has."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, 16, batch_first=True)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
            self.mlp.add_module("gelu", nn.GELU())
            self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

        def forward(self, x, mask=None):
            normed = self.ln_1(x)
            x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Tower(nn.Module):
        def __init__(self, width, layers):
            super().__init__()
            self.resblocks = nn.ModuleList(OpenClip.Block(width) for _ in range(layers))

    class Visual(nn.Module):
        def __init__(self, width=48, patch=8):
            super().__init__()
            self.class_embedding = nn.Parameter(torch.zeros(width))
            self.positional_embedding = nn.Parameter(torch.zeros((SIDE // patch) ** 2 + 1, width))
            self.proj = nn.Parameter(torch.zeros(width, 16))
            self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
            self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
            self.transformer = OpenClip.Tower(width, 3)

        def forward(self, pixels):
            x = self.conv1(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
            x = self.ln_pre(x)
            for block in self.transformer.resblocks:
                x = block(x)
            return self.ln_post(x[:, 0]) @ self.proj

    def __init__(self, vocabulary, width=32):
        super().__init__()
        self.visual = OpenClip.Visual()
        self.transformer = OpenClip.Tower(width, 2)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(77, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, 16))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def text(self, ids):
        """ids: (N, 77), 0 after the end, whose id is the highest."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((77, 77), -math.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.ln_final(x)[torch.arange(len(x)), ids.argmax(dim=-1)] @ self.text_projection


def blip_weights(vision=128, text=64, vocabulary=64, layers=2):
    """ImageReward's names and shapes, smaller: heads of 64."""
    shapes = {
        "visual_encoder.cls_token": (1, 1, vision),
        "visual_encoder.pos_embed": (1, 17, vision),
        "visual_encoder.patch_embed.proj.weight": (vision, 3, 8, 8),
        "visual_encoder.patch_embed.proj.bias": (vision,),
        "visual_encoder.norm.weight": (vision,),
        "visual_encoder.norm.bias": (vision,),
        "text_encoder.embeddings.word_embeddings.weight": (vocabulary, text),
        "text_encoder.embeddings.position_embeddings.weight": (40, text),
        "text_encoder.embeddings.LayerNorm.weight": (text,),
        "text_encoder.embeddings.LayerNorm.bias": (text,),
        "vision_proj.weight": (16, vision),
        "text_proj.weight": (16, text),
    }
    for n in range(layers):
        block, layer = f"visual_encoder.blocks.{n}.", f"text_encoder.encoder.layer.{n}."
        for name, out, inside in (
            (block + "attn.qkv", 3 * vision, vision),
            (block + "attn.proj", vision, vision),
            (block + "mlp.fc1", 2 * vision, vision),
            (block + "mlp.fc2", vision, 2 * vision),
            *((f"{layer}attention.self.{part}", text, text) for part in ("query", "key", "value")),
            (layer + "attention.output.dense", text, text),
            (layer + "crossattention.self.query", text, text),
            (layer + "crossattention.self.key", text, vision),
            (layer + "crossattention.self.value", text, vision),
            (layer + "crossattention.output.dense", text, text),
            (layer + "intermediate.dense", 2 * text, text),
            (layer + "output.dense", text, 2 * text),
        ):
            shapes[name + ".weight"], shapes[name + ".bias"] = (out, inside), (out,)
        for name in (block + "norm1", block + "norm2"):
            shapes[name + ".weight"] = shapes[name + ".bias"] = (vision,)
        for part in ("attention.", "crossattention.", ""):
            name = f"{layer}{part}output.LayerNorm"
            shapes[name + ".weight"] = shapes[name + ".bias"] = (text,)
    generator = torch.Generator().manual_seed(3)
    return {name: random_weight(name, shape, generator) for name, shape in shapes.items()}


def blip_state(w, pixels, ids, mask):
    """The first token's state, from the weights alone: arXiv 2201.12086's encoder with cross-attention."""

    def affine(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def attend(q, k, v, bias=0.0):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        return ((q @ k.transpose(-1, -2) / 8 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    x = F.conv2d(
        pixels, w["visual_encoder.patch_embed.proj.weight"], w["visual_encoder.patch_embed.proj.bias"], 8
    )
    x = x.flatten(2).transpose(1, 2)
    x = (
        torch.cat([w["visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1)
        + w["visual_encoder.pos_embed"]
    )
    for n in range(2):
        name = f"visual_encoder.blocks.{n}."
        x = x + affine(
            attend(*affine(norm(x, name + "norm1", 1e-6), name + "attn.qkv").chunk(3, -1)), name + "attn.proj"
        )
        x = x + affine(F.gelu(affine(norm(x, name + "norm2", 1e-6), name + "mlp.fc1")), name + "mlp.fc2")
    seen = norm(x, "visual_encoder.norm", 1e-6)

    name = "text_encoder.embeddings."
    y = w[name + "word_embeddings.weight"][ids] + w[name + "position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, name + "LayerNorm", 1e-12)
    bias = torch.where(mask[:, None, None].bool(), 0.0, -math.inf)
    for n in range(2):
        name = f"text_encoder.encoder.layer.{n}."
        for part, keys, hidden in (("attention", None, bias), ("crossattention", seen, 0.0)):
            keys = y if keys is None else keys
            own = f"{name}{part}.self."
            read = attend(
                affine(y, own + "query"), affine(keys, own + "key"), affine(keys, own + "value"), hidden
            )
            y = norm(y + affine(read, f"{name}{part}.output.dense"), f"{name}{part}.output.LayerNorm", 1e-12)
        inner = affine(F.gelu(affine(y, name + "intermediate.dense")), name + "output.dense")
        y = norm(y + inner, name + "output.LayerNorm", 1e-12)
    return y[:, 0]
