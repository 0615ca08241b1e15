"""Picture files as a reward gets them, from a folder and through the reward server."""

import base64
import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.rewards.pictures import read_image

FIXED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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


@pytest.fixture
def by_file(tmp_path):
    def read(file, name="picture.png"):
        (tmp_path / name).write_bytes(file)
        return read_image(tmp_path / name)

    return read


def drawn(rng, channels, dtype):
    height, width = rng.integers(1, 7, 2)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, channels)).astype(dtype)


@FIXED
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.sampled_from([1, 2, 3, 4]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    orientation=st.sampled_from(list(STORED)),
)
def test_any_png_is_what_people_see(by_file, seed, channels, dtype, orientation):
    pixels = drawn(np.random.default_rng(seed), channels, dtype)
    file = png(np.ascontiguousarray(STORED[orientation](pixels)), orientation)
    for read in (by_file, by_server):
        image = read(file)
        assert image.dtype == np.uint8 and image.shape == (*pixels.shape[:2], 3)
        # of 16 bits the upper ones: of a colour, of its share, and then rounded
        np.testing.assert_allclose(image, shown(pixels), atol=3 if dtype == np.uint16 else 1)


@FIXED
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["PNG", "TIFF", "WEBP", "BMP"]),
    channels=st.sampled_from([1, 3, 4]),
    orientation=st.sampled_from(list(STORED)),
)
def test_pictures_of_other_formats(by_file, seed, kind, channels, orientation):
    if kind == "BMP":  # has no EXIF, and a fourth byte without a meaning
        orientation, channels = 1, min(channels, 3)
    pixels = drawn(np.random.default_rng(seed), channels, np.uint8)
    stored = np.ascontiguousarray(STORED[orientation](pixels))
    image = Image.fromarray(stored[..., 0] if channels == 1 else stored)
    options = {} if kind == "BMP" else {"exif": exif(orientation)}
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    np.testing.assert_allclose(by_file(saved(image, kind, **options)), shown(pixels), atol=1)


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@FIXED
@given(data=st.data())
def test_damaged_files_are_refused_in_one_line(by_file, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pixels = drawn(rng, data.draw(st.sampled_from([1, 2, 3, 4])), np.uint16)
    file = bytearray(png(pixels))
    if data.draw(st.booleans()):  # other than PNG's, what they hold has no check sum
        kind = data.draw(st.sampled_from(["JPEG", "TIFF", "WEBP", "BMP"]))
        file = bytearray(saved(Image.fromarray(drawn(rng, 3, np.uint8)), kind))
    for place in data.draw(st.lists(st.integers(0, len(file) - 1), max_size=8)):
        file[place] = rng.integers(256)
    file = bytes(file[: data.draw(st.integers(0, len(file)))])
    for read in (by_file, by_server):
        try:
            image = read(file)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize(
    "image, kind, words",
    [
        (Image.fromarray(np.full((2, 3), 0.5, np.float32)), "TIFF", "32-bit floats of an unknown range"),
        (Image.fromarray(np.full((2, 3), 70_000, np.int32)), "TIFF", "32-bit integers of an unknown range"),
    ],
)
def test_numbers_of_an_unknown_range_are_refused(by_file, image, kind, words):
    with pytest.raises(UserError, match=f"cannot be read as a picture: expected 8 or 16 bits .* {words}"):
        by_file(saved(image, kind), "picture.tif")


@pytest.mark.parametrize("photometric, white", [(1, 65535), (0, 0)])
def test_a_16_bit_tiff_is_scaled_or_refused(by_file, photometric, white):
    file = saved(Image.fromarray(np.full((2, 3), white, np.uint16)), "TIFF", tiffinfo={262: photometric})
    if photometric:
        assert (by_file(file, "picture.tif") == 255).all()
    else:  # the other way round, which Pillow does not see
        with pytest.raises(UserError, match="another kind of TIFF"):
            by_file(file, "picture.tif")


def test_an_animation_is_refused(by_file):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    file = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="expected one picture, got 2 frames"):
        by_file(file)
    with pytest.raises(UserError, match="image 0 is a broken PNG, or has several frames"):
        by_server(file)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_one_color_that_is_transparent_is_white(by_file, mode):
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
