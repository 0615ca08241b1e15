"""A picture file as a reward gets it: as people see it, or refused."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

SIXTEEN = ("I;16", "I;16B", "I;16L")  # one channel of 16 bits
REFUSED = {"I": "32-bit integers", "F": "32-bit floats"}
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
MIN_IS_BLACK = 1


def to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3), of an opened picture.

    Turned as its EXIF says; 16 bits a channel scaled to 8; what is transparent over white.
    Raises ValueError with the reason for what has no such meaning: numbers of an unknown range, several
    pictures in one file. Whatever a decoder raises on a damaged file comes through.
    """
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # of MPO the rest are previews
    if frames > 1:
        raise ValueError(f"expected one picture, got {frames} frames")
    if image.mode in REFUSED:
        raise ValueError(f"expected 8 or 16 bits a channel, got {REFUSED[image.mode]} of an unknown range")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in SIXTEEN:
        return _scaled(upright, image)
    if upright.mode in ("RGBa", "La"):
        upright = upright.convert(upright.mode.upper())
    if not upright.has_transparency_data:
        return np.asarray(upright.convert("RGB"))
    white = Image.new("RGBA", upright.size, "white")
    return np.asarray(Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB"))


def _scaled(upright: Image.Image, opened: Image.Image) -> np.ndarray:
    """The upper 8 of 16 bits, as Pillow does for 16-bit RGB."""
    tags = getattr(opened, "tag_v2", {PHOTOMETRIC: MIN_IS_BLACK, BITS: (16,)})
    if tags.get(PHOTOMETRIC) != MIN_IS_BLACK or tags.get(BITS) != (16,):
        raise ValueError("expected 16 bits from black to white, got another kind of TIFF")
    values = np.asarray(upright)
    gray = (values >> 8).astype(np.uint8)
    if (transparent := upright.info.get("transparency")) is not None:
        gray[values == transparent] = 255
    return np.repeat(gray[..., None], 3, axis=2)
