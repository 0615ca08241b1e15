"""Picture files as a reward gets them, from a folder and through the reward server."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from crd_fast.errors import UserError
from tests.rewards.picture_files import by_file, by_server, png, saved


@pytest.mark.parametrize(
    "image, kind, words",
    [
        (Image.fromarray(np.full((2, 3), 0.5, np.float32)), "TIFF", "32-bit floats of an unknown range"),
        (Image.fromarray(np.full((2, 3), 70_000, np.int32)), "TIFF", "32-bit integers of an unknown range"),
    ],
)
def test_numbers_of_an_unknown_range_are_refused(image, kind, words):
    with pytest.raises(UserError, match=f"cannot be read as a picture: expected 8 or 16 bits .* {words}"):
        by_file(saved(image, kind), "picture.tif")


@pytest.mark.parametrize("photometric, white", [(1, 65535), (0, 0)])
def test_a_16_bit_tiff_is_scaled_or_refused(photometric, white):
    file = saved(Image.fromarray(np.full((2, 3), white, np.uint16)), "TIFF", tiffinfo={262: photometric})
    if photometric:
        assert (by_file(file, "picture.tif") == 255).all()
    else:  # the other way round, which Pillow does not see
        with pytest.raises(UserError, match="another kind of TIFF"):
            by_file(file, "picture.tif")


def test_an_animation_is_refused():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    file = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="expected one picture, got 2 frames"):
        by_file(file)
    with pytest.raises(UserError, match="image 0 is a broken PNG, or has several frames"):
        by_server(file)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_one_color_that_is_transparent_is_white(mode):
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((1, 0), (200, 200, 200))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    clear = image.getpixel((0, 0))
    file = saved(image, "PNG", transparency=clear)
    for read in (by_file, by_server):
        assert read(file).tolist() == [[[255] * 3, [200] * 3]]


def test_turned_pictures_of_one_request_must_have_one_size():
    server = pytest.importorskip("crd_fast.rewards.server", reason="needs fastapi and uvicorn")
    pixels = np.zeros((4, 6, 3), np.uint8)
    files = [base64.b64encode(png(pixels, orientation)).decode() for orientation in (1, 6)]
    body = {"images": files, "prompts": ["a", "b"], "metadata": [{}, {}]}
    with pytest.raises(server.Refused) as refused:
        server.parse_score(json.dumps(body).encode(), server.Limits())
    assert refused.value.detail == "images: image 1 has another size than the first"
