"""Picture files of any kind: as people see them, or refused in one line; by folder and through the server."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.budget import answer, cases
from tests.rewards.picture_files import STORED, by_file, by_server, drawn, exif, png, saved, shown


def read(file, way):
    return answer("pictures", way, file)


@cases(150)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.sampled_from([1, 2, 3, 4]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    orientation=st.sampled_from(list(STORED)),
)
def test_any_png_is_what_people_see(seed, channels, dtype, orientation):
    pixels = drawn(np.random.default_rng(seed), channels, dtype)
    file = png(np.ascontiguousarray(STORED[orientation](pixels)), orientation)
    for way in (by_file, by_server):
        image = read(file, way)
        assert image.dtype == np.uint8 and image.shape == (*pixels.shape[:2], 3)
        # of 16 bits the upper ones: of a colour, of its share, and then rounded
        np.testing.assert_allclose(image, shown(pixels), atol=3 if dtype == np.uint16 else 1)


@cases(150)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["PNG", "TIFF", "WEBP", "BMP"]),
    channels=st.sampled_from([1, 3, 4]),
    orientation=st.sampled_from(list(STORED)),
)
def test_pictures_of_other_formats(seed, kind, channels, orientation):
    if kind == "BMP":  # has no EXIF, and a fourth byte without a meaning
        orientation, channels = 1, min(channels, 3)
    pixels = drawn(np.random.default_rng(seed), channels, np.uint8)
    stored = np.ascontiguousarray(STORED[orientation](pixels))
    image = Image.fromarray(stored[..., 0] if channels == 1 else stored)
    options = {} if kind == "BMP" else {"exif": exif(orientation)}
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    image = read(saved(image, kind, **options), by_file)
    np.testing.assert_allclose(image, shown(pixels), atol=1)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@cases(150)
@given(data=st.data())
def test_damaged_files_are_refused_in_one_line(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pixels = drawn(rng, data.draw(st.sampled_from([1, 2, 3, 4])), np.uint16)
    file = bytearray(png(pixels))
    if data.draw(st.booleans()):  # other than PNG's, what they hold has no check sum
        kind = data.draw(st.sampled_from(["JPEG", "TIFF", "WEBP", "BMP"]))
        file = bytearray(saved(Image.fromarray(drawn(rng, 3, np.uint8)), kind))
    for place in data.draw(st.lists(st.integers(0, len(file) - 1), max_size=8)):
        file[place] = rng.integers(256)
    file = bytes(file[: data.draw(st.integers(0, len(file)))])
    for way in (by_file, by_server):
        image = read(file, way)
        assert image is None or (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3)
