"""CLIP through transformers: loading, its authors' preprocessing, normalised embeddings.

Also used for models that look at pictures in the same way (BLIP's ImageReward).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from crd_fast.errors import UserError, reason_of

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of openai/CLIP, which OpenCLIP and BLIP use as well
STD = (0.26862954, 0.26130258, 0.27577711)
MODEL_FILES = (("config.json",), ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"))
TOKENIZER_FILES = (("tokenizer.json", "vocab.json", "vocab.txt"),)

logger = logging.getLogger("crd_fast")


class Clip:
    """A CLIP model with its tokenizer. Embeddings are float32, on the device, of length 1.

    Raises UserError, one line, if `path` or `tokenizer` is neither a folder with the files nor a hub id that
    can be loaded.
    """

    def __init__(self, reward: str, path: str, tokenizer: str | None, device: str, model: Any = None):
        """model: a CLIPModel that is already there, which is not looked for at `path`."""
        from transformers import CLIPModel

        if model is None:
            model = pretrained(reward, CLIPModel, path, MODEL_FILES)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = load_tokenizer(reward, tokenizer or path)
        self.reward, self.device = reward, device
        self.size = model.config.vision_config.image_size
        self.length = model.config.text_config.max_position_embeddings
        self.cut: set[str] = set()

    def to(self, device: str) -> None:
        """Moves the network."""
        self.model.to(device)
        self.device = device

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: preprocessed, (N, 3, size, size). Returns (N, dimension)."""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return normalized(self.model.visual_projection(pooled))

    def texts(self, texts: list[str]) -> torch.Tensor:
        """Returns (N, dimension). Texts that are too long lose their end.

        There is no padding mask: attention is causal and the embedding is read at the end of the text, so
        that nothing that counts sees the padding.
        """
        warn_of_cut(self.reward, self.tokenizer, texts, self.length, self.cut)
        ids = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids.to(self.device)
        return normalized(self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output))


def normalized(embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings / embeddings.norm(dim=-1, keepdim=True)


def preprocess(images: list[Image.Image] | np.ndarray, size: int) -> torch.Tensor:
    """CLIP's own preprocessing (openai/CLIP, clip/clip.py): the shorter side to `size` (bicubic, on 8 bits),
    the middle square, [0, 1], minus the mean, by the standard deviation.

    images: uint8 (N, height, width, 3), or pictures. Returns float32, (N, 3, size, size).
    """
    pictures = (image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images)
    batch = [_square(picture, size) for picture in pictures]
    return standardized(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 255)


def standardized(pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, height, width) in [0, 1] as CLIP wants it."""
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _square(image: Image.Image, size: int) -> np.ndarray:
    image = image.convert("RGB")
    shorter, longer = sorted(image.size)
    scaled = (size, int(size * longer / shorter))
    width, height = scaled if image.width <= image.height else scaled[::-1]
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.array(image.crop((left, top, left + size, top + size)))


def warn_of_cut(reward: str, tokenizer, texts: list[str], length: int, cut: set[str]) -> None:
    """Says, once, that texts are longer than a scorer reads: what stands at their end is not judged.

    cut: the texts that were seen to be, empty before the first; that one is all it is told of.
    """
    if cut:
        return
    for text in dict.fromkeys(texts):
        count = len(tokenizer(text, verbose=False).input_ids)
        if count > length:
            cut.add(text)
            logger.warning(
                "warning: reward %s: reads the first %d tokens of a prompt, and one has %d",
                reward,
                length,
                count,
            )
            return


def load_tokenizer(reward: str, path: str):
    from transformers import AutoTokenizer

    return pretrained(reward, AutoTokenizer, path, TOKENIZER_FILES)


def pretrained(reward: str, kind, path: str, files: tuple[tuple[str, ...], ...]):
    """`kind.from_pretrained(path)` of a folder or hub id; a model in float32, and only with every weight.

    files: of each group a folder must have one.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        missing = [group for group in files if not any((folder / name).exists() for name in group)]
        if missing:
            raise UserError(f"reward {reward}: {path}: expected {' or '.join(missing[0][:2])} in this folder")
    elif path.startswith(("/", "~", ".")) or path.count("/") > 1:
        raise UserError(f"reward {reward}: {path}: no such folder")
    is_model = any("config.json" in group for group in files)
    more = {"dtype": torch.float32, "output_loading_info": True} if is_model else {}
    try:
        loaded = kind.from_pretrained(str(folder) if folder.is_dir() else path, **more)
    except Exception as error:  # of a dozen libraries: bad JSON, a cut-off file, no network, another class
        wanted = " and ".join(group[0] for group in files)
        raise UserError(
            f"reward {reward}: {path}: expected a folder with {wanted}, or a hub id: {reason_of(error)}"
        ) from None
    if not is_model:
        return loaded
    model, info = loaded
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"reward {reward}: {path}: expected weights of a {kind.__name__}, found none for {lacking[0]} "
            f"and {len(lacking) - 1} more"
        )
    return model


def weights_file(reward: str, path: str, name: str, source: str) -> dict[str, torch.Tensor]:
    """The tensors of one file: `path` is the file, a folder that has `name` in it, or a hub id.

    source: where people get it, for the error.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / name
        if not file.exists():
            raise UserError(f"reward {reward}: {path}: expected {name} in this folder; it is {source}")
    elif not file.is_file():
        if path.startswith(("/", "~", ".")) or path.count("/") != 1 or file.suffix:
            raise UserError(f"reward {reward}: {path}: no such file or folder; expected {name}, {source}")
        try:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, name))
        except Exception as error:  # no network, no such repository, refused
            reason = reason_of(error)
            raise UserError(
                f"reward {reward}: {name} of {path} cannot be had: {reason}; it is {source}"
            ) from None
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"reward {reward}: {file}: expected a file of weights: {reason_of(error)}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"reward {reward}: {file}: expected tensors by name")
    return state
