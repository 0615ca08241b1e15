"""Picture files made by hand, and the two ways in which a reward gets them."""

import base64
import json
import struct
import tempfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.rewards.pictures import read_image

# what a viewer does to show a picture that is stored so: EXIF's orientations
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),  # shown after a quarter turn clockwise
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}
PNG_COLORS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels: the format's number for them


def png(pixels, orientation=1):
    """A PNG of uint8 or uint16 (H, W, channels), by hand: Pillow writes no 16-bit colours."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    bits = 8 * pixels.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, PNG_COLORS[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels)
    exif = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part)
        for part in ((b"IHDR", header), (b"eXIf", exif), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def saved(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shown(pixels):
    """What people see of uint8 or uint16 (H, W, channels), float (H, W, 3) in 0 to 255."""
    values = pixels.astype(float) / (1 if pixels.dtype == np.uint8 else 257)
    if pixels.shape[2] in (2, 4):
        alpha = values[..., -1:] / 255
        values = values[..., :-1] * alpha + 255 * (1 - alpha)
    return np.broadcast_to(values, (*values.shape[:2], 3))


def by_server(file):
    """Through the server's own parsing."""
    server = pytest.importorskip("crd_fast.rewards.server", reason="needs fastapi and uvicorn")
    body = {"images": [base64.b64encode(file).decode()], "prompts": ["a"], "metadata": [{}]}
    try:
        return server.parse_score(json.dumps(body).encode(), server.Limits())[0][0]
    except server.Refused as refused:
        assert 400 <= refused.status < 500
        raise UserError(refused.detail) from None


def by_file(file, name="picture.png"):
    """Through a file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(file)
        return read_image(path)


def drawn(rng, channels, dtype):
    height, width = rng.integers(1, 7, 2)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, channels)).astype(dtype)


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found
