"""The built-in models: small MM-DiTs in pixel space, for the world of `crd_fast.prompts.world` and for signs.

The transformer is diffusers' SD3 class, the text encoder transformers' T5 encoder over whole words (and, on
signs, letters). Their weights ship with the package; `tools/pretrain_builtin.py` and
`tools/pretrain_builtin_ocr.py` made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from safetensors.torch import load_file, save_file
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers
from transformers import T5Config, T5EncoderModel

from crd_fast.errors import UserError
from crd_fast.models.base import JOINT_ATTENTION, FlowModel, states_and_pooled
from crd_fast.models.negative import unmarked
from crd_fast.sizes import Resolution
from crd_fast.worlds import WORLDS, World

WIDTH, LAYERS, HEADS, PATCH = 128, 5, 4, 4
SHIFT = 3.0  # of the sigma schedule: layouts are decided at high noise
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class Kind:
    """What the built-in models differ in. spell: the prompt as tokens with spaces between them."""

    name: str
    folder: Path
    height: int
    width: int
    max_tokens: int
    words: Callable[[], set[str]]
    spell: Callable[[str], str]

    @classmethod
    def of(cls, world: World) -> Kind:
        known = import_module(world.module)
        sizes = known.HEIGHT, known.WIDTH, known.MAX_TOKENS
        return cls(world.name, world.folder, *sizes, known.vocabulary, known.spell)


KINDS = {name: Kind.of(world) for name, world in WORLDS.items()}
WORLD, SIGNS = KINDS["builtin"], KINDS["builtin-ocr"]


def make_tokenizer(kind: Kind) -> Tokenizer:
    """Whole words; the empty prompt is the end token alone."""
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *sorted(kind.words())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=kind.max_tokens)
    return tokenizer


def make_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def make_transformer(kind: Kind) -> SD3Transformer2DModel:
    side = max(kind.height, kind.width)  # positions are cropped from a square
    return SD3Transformer2DModel(
        sample_size=side,
        patch_size=PATCH,
        in_channels=3,
        out_channels=3,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=side // PATCH,
        qk_norm="rms_norm",
    )


def tokenized(kind: Kind, tokenizer: Tokenizer, prompts: list[str]) -> list[Encoding]:
    """Raises UserError for the first prompt that is too long, has an unknown word, or cannot be spelled."""
    spelled = [kind.spell(prompt) for prompt in prompts]
    encodings = tokenizer.encode_batch([f"{text} {END}".strip() for text in spelled])
    for prompt, text, encoding in zip(prompts, spelled, encodings):
        if len(encoding.ids) > kind.max_tokens:
            raise UserError(
                f"prompt: at most {kind.max_tokens - 1} words for the built-in model, got {prompt!r}"
            )
        unknown = [word for word, token in zip(text.split(), encoding.tokens) if token == UNKNOWN]
        if unknown:
            raise UserError(f"prompt: the built-in model does not know the word {unknown[0]!r} in {prompt!r}")
    return encodings


def encode(
    kind: Kind, tokenizer: Tokenizer, text_encoder: T5EncoderModel, prompts: list[str]
) -> dict[str, torch.Tensor]:
    """Token states (P, max_tokens, 128) and their mean over the real tokens (P, 128)."""
    encodings = tokenized(kind, tokenizer, prompts)
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    return {"states": states, "pooled": states.sum(1) / mask.sum(1, keepdim=True)}


class BuiltinModel(FlowModel):
    """A flow model as the trainer sees it: prompts to embeddings, velocities, latents to images.

    transformer: the network that is trained. Latents are pixels in [-1, 1], (B, 3, height, width) float32;
    the size is the kind's, whatever resolution is asked for.
    """

    lora_loader = SD3LoraLoaderMixin
    lora_targets = JOINT_ATTENTION

    def __init__(
        self,
        kind: Kind,
        transformer: SD3Transformer2DModel,
        text_encoder: T5EncoderModel | None,
        tokenizer: Tokenizer | None,
    ):
        self.kind = kind
        self.name = kind.name
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        return (3, self.kind.height, self.kind.width)

    def unreadable(self, prompts: Iterable[str]) -> tuple[str, str] | None:
        assert self.tokenizer is not None
        for prompt in map(unmarked, prompts):
            try:
                tokenized(self.kind, self.tokenizer, [prompt])
            except UserError as error:
                return prompt, str(error).removeprefix("prompt: ")
        return None

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of P prompts, each tensor with a first axis of P, on the transformer's device."""
        assert self.tokenizer is not None and self.text_encoder is not None
        texts = list(map(unmarked, prompts))
        embeddings = encode(self.kind, self.tokenizer, self.text_encoder, texts)
        return {key: value.to(self.transformer.device) for key, value in embeddings.items()}

    def sigmas(self, steps: int, resolution: Resolution) -> torch.Tensor:
        """The scheduler's own noise levels: (steps + 1,), from 1 to 0, even before the shift."""
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
        return self.scheduler.sigmas.clone()

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, embeddings: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """d x / d sigma. x: (B, 3, height, width); sigma: (B,); embeddings with a first axis of B."""
        dtype = self.transformer.proj_out.weight.dtype
        return self.transformer(
            hidden_states=x.to(dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=embeddings["states"].to(dtype),
            pooled_projections=embeddings["pooled"].to(dtype),
            return_dict=False,
        )[0]

    def longest_embeddings(self, prompts: int) -> dict[str, torch.Tensor]:
        return states_and_pooled(self.transformer.config, prompts, self.kind.max_tokens, torch.float32)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, height, width, 3), float32 in [0, 1]."""
        return ((latents.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes transformer, text encoder and tokenizer as safetensors and JSON."""
        assert self.tokenizer is not None
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("transformer", "text_encoder"):
            state = getattr(self, name).state_dict()
            if name == "text_encoder":
                state.pop("encoder.embed_tokens.weight", None)  # the same tensor as `shared`
            state = {key: value.to(dtype).contiguous() for key, value in state.items()}
            save_file(state, folder / f"{name}.safetensors")
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @classmethod
    def new(cls, kind: Kind, seed: int) -> BuiltinModel:
        """With random weights, to be pretrained."""
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(kind)
        text_encoder = make_text_encoder(tokenizer.get_vocab_size())
        return cls(kind, make_transformer(kind), text_encoder, tokenizer)

    @classmethod
    def load(cls, kind: Kind = WORLD, folder: Path | None = None) -> BuiltinModel:
        """Loads the weights that ship with the package, or those in `folder`, in float32.

        Raises UserError if a file is missing or damaged.
        """
        folder = folder or kind.folder
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            states = {
                name: load_file(folder / f"{name}.safetensors") for name in ("transformer", "text_encoder")
            }
        except Exception as error:  # safetensors and tokenizers raise types of their own
            raise UserError(f"{folder}: the built-in model cannot be read: {error}") from error
        transformer = make_transformer(kind)
        transformer.load_state_dict(_float(states["transformer"]))
        text_encoder = make_text_encoder(tokenizer.get_vocab_size())
        text_encoder.load_state_dict(_float(states["text_encoder"]), strict=False)
        text_encoder.encoder.embed_tokens = text_encoder.shared
        for module in (transformer, text_encoder):
            module.requires_grad_(False).eval()
        return cls(kind, transformer, text_encoder, tokenizer)


def _float(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in state.items()}
