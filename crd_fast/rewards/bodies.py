"""What a request to a reward server brings, checked before anything is decoded: see `server`."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from crd_fast.rewards.lent import read_only
from crd_fast.rewards.rgb import to_rgb

PNG_START = b"\x89PNG\r\n\x1a\n"  # then the length and name of the header chunk, width and height


@dataclass(frozen=True)
class Limits:
    """What one request may bring, and how many may wait.

    bytes: of a body. images, pixels: of a request, all its images together. requests: at once, scored or
    waiting. seconds: until a body is there.
    """

    bytes: int = 64 * 2**20
    images: int = 64
    pixels: int = 64 * 2**20
    requests: int = 16
    seconds: float = 60.0


LIMITS = Limits()


class Refused(Exception):
    """A request that cannot be scored: the HTTP status and one line."""

    def __init__(self, status: int, detail: str):
        self.status, self.detail = status, detail


def parse_score(body: bytes, limits: Limits) -> tuple[np.ndarray, list[str], list[dict]]:
    """Images, uint8 (N, height, width, 3), prompts and metadata. Raises Refused for anything else."""
    fields = fields_of(body, "images", "prompts", "metadata")
    encoded, prompts, metadata = fields["images"], fields["prompts"], dicts_of(fields["metadata"])
    if not isinstance(encoded, list) or not all(isinstance(image, str) for image in encoded) or not encoded:
        raise Refused(400, "images: expected a list of at least one PNG in base64")
    if len(encoded) > limits.images:
        raise Refused(413, f"images: expected at most {limits.images}, got {len(encoded)}")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(400, "prompts: expected a list of strings")
    if not len(encoded) == len(prompts) == len(metadata):
        raise Refused(
            400, f"expected as many prompts and metadata as images ({len(encoded)}), got {len(prompts)} and "
            f"{len(metadata)}",
        )  # fmt: skip
    files = []
    for i, text in enumerate(encoded):
        try:
            files.append(base64.b64decode(text, validate=True))
        except ValueError:
            raise Refused(400, f"images: image {i} is not base64") from None
        if _size(files[i], i) != _size(files[0], 0):
            raise Refused(400, f"images: image {i} has another size than the first")
    width, height = _size(files[0], 0)
    if len(files) * width * height > limits.pixels:
        raise Refused(413, f"images: expected at most {limits.pixels} pixels in all")
    images = np.empty((0,))
    for i, file in enumerate(files):
        pixels = _pixels(file, i, (width, height))
        if not i:
            images = np.empty((len(files), *pixels.shape), dtype=np.uint8)
        elif pixels.shape != images.shape[1:]:  # turned by its EXIF
            raise Refused(400, f"images: image {i} has another size than the first")
        images[i] = pixels
    return read_only(images), prompts, [{**entry, "prompt": p} for entry, p in zip(metadata, prompts)]


def _pixels(file: bytes, i: int, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(BytesIO(file), formats=["PNG"]) as image:
            if image.size != size:  # by a second header, which the decoder goes by
                raise ValueError("two headers")
            return to_rgb(image)
    except Exception:  # whatever a decoder raises on bytes that somebody sent
        raise Refused(400, f"images: image {i} is a broken PNG, or has several frames") from None


def fields_of(body: bytes, *names: str) -> dict:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "expected JSON") from None
    if not isinstance(fields, dict) or set(fields) != set(names):
        raise Refused(400, f"expected an object with {', '.join(names)} and nothing else")
    try:
        text = [fields[name] for name in names if name != "images"]  # those are ASCII or refused
        json.dumps(text, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # halves of characters, NaN
        raise Refused(400, "expected text that UTF-8 can hold and finite numbers") from None
    return fields


def dicts_of(metadata) -> list[dict]:
    if not isinstance(metadata, list) or not all(isinstance(entry, dict) for entry in metadata):
        raise Refused(400, "metadata: expected a list of objects")
    return metadata


def _size(file: bytes, i: int) -> tuple[int, int]:
    """Width and height as the PNG's header states them, before anything is decoded."""
    if not file.startswith(PNG_START) or file[12:16] != b"IHDR" or len(file) < 24:
        raise Refused(400, f"images: image {i} is not a PNG")
    return struct.unpack(">II", file[16:24])
