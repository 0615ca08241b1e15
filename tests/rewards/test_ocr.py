"""OCR: the scoring rule, the recogniser on rendered words, and its exact CTC likelihood."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from crd_fast.errors import UserError
from crd_fast.rewards.ocr import (
    OCR,
    OCRDense,
    folded_classes,
    normalized,
    target_text,
    text_score,
)

pytest.importorskip("rapidocr", reason="needs rapidocr and onnxruntime (pip install 'crd-fast[ocr]')")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install 'crd-fast[ocr]')")
matplotlib = pytest.importorskip("matplotlib")


def render(text, size=32, font="DejaVuSans", canvas=(64, 256)):
    """uint8 (H, W, 3), black on white, in the middle."""
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf"
    image = Image.new("RGB", canvas[::-1], "white")
    middle = (canvas[1] / 2, canvas[0] / 2)
    ImageDraw.Draw(image).text(middle, text, font=ImageFont.truetype(path, size), fill="black", anchor="mm")
    return np.asarray(image)


def sign(text):
    return f'a sign that says "{text}"'


@pytest.mark.parametrize(
    "prompt, text",
    [
        ('a sign that says "CAT"', "CAT"),
        ('"Open  Now" on a door', "Open  Now"),
        ("a sign that says “Grüße”", "Grüße"),
        ('a "FIRST" and a "SECOND" sign', "FIRST"),
        ("Ein Schild mit „Hallo“", "Hallo"),
        ("en skylt med ”Hej”", "Hej"),
        ("une pancarte « Ouvert »", "Ouvert"),
        ("ein Schild mit »Offen« darauf", "Offen"),
        ("招牌上写着「你好」", "你好"),
        ("看板『営業中』", "営業中"),
        ("＂OPEN＂", "OPEN"),
        ('5" pipe with a sign "OPEN"', "OPEN"),
        ('a 5” pipe, a 7" one and a sign “OPEN”', "OPEN"),
        ('a sign that says "A5"', "A5"),
        ('"5" on a door', "5"),
        ("A cat holding a sign that says '123'", "123"),
        ("a cat's sign: ‘Don’t panic’", "Don’t panic"),
        ("the dogs' 5' fence, it's '90s style, says 'Don't run'", "Don't run"),
        ("it's the cats' sign “OPEN”", "OPEN"),
        ("'no' and \"yes\"", "yes"),
        ("a 5\" pipe with a sign 'OPEN'", "OPEN"),
        ("a rock 'n' roll poster that says 'LIVE'", "LIVE"),
        ("a sign that says 'n' in red", "n"),
        ("it says ''Don't''", "Don't"),
        ('says \\"CAT\\"', "CAT"),
    ],
)
def test_target_is_what_stands_in_quotes(prompt, text):
    assert target_text(prompt) == text


@pytest.mark.parametrize(
    "prompt",
    [
        "the dogs' sign isn't 'ours",
        '5" and 7" pipes',
        "„half",
        "a sign",
        'a sign that says ""',
        'a sign that says " "',
        'half a "quote',
        "half a 'n' “quote",
        "",
    ],
)
def test_prompts_without_a_text_are_refused(prompt):
    with pytest.raises(UserError, match="expected a text in double quotes") as error:
        OCR(mode="word").check([{"prompt": sign("fine")}, {"prompt": prompt}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "read, wanted, score",
    [
        ("CAT", "CAT", 1.0),
        ("c a t", "CAT", 1.0),  # case and spaces do not count
        ("the cat sat", "CAT", 1.0),  # contained
        ("CAR", "CAT", 2 / 3),  # one substitution
        ("CA", "CAT", 2 / 3),  # one deletion
        ("CHAT", "CAT", 2 / 3),  # one insertion
        ("", "CAT", 0.0),
        ("something else altogether", "CAT", 0.0),  # never below 0
    ],
)
def test_the_score_by_hand(read, wanted, score):
    assert text_score(normalized(read), normalized(wanted)) == pytest.approx(score)


@pytest.mark.parametrize(
    "drawn, read",
    [
        ("Don’t", "Don't"),
        ("Don´t", "don`t"),
        ("A—B", "A-B"),
        ("A – B", "A−B"),
        ("Cafe\u0301", "café"),
        ("ＯＰＥＮ", "open"),
        ("ﬁne", "fine"),
        ("1⅓", "11/3"),
        ("wait…", "wait..."),
        ("co\u00adop\u200b", "coop"),
        ("a\u00a0b", "ab"),
    ],
)
def test_what_looks_alike_is_alike(drawn, read):
    assert normalized(drawn) == normalized(read) and text_score(normalized(read), normalized(drawn)) == 1


def test_what_does_not_look_alike_is_not():
    texts = ["cafe", "café", "1/3", "13", "a-b", "ab", "don't", "dont", "ß", "ss", '5"', "5'"]
    assert len({normalized(text) for text in texts}) == len(texts)


@pytest.fixture(scope="module")
def words():
    return ["HELLO", "Window", "cat", "BRIDGE"]


def test_word_mode_reads_rendered_words_in_one_batch(words):
    images = np.stack([render(text) for text in words])
    reward = OCR(mode="word")
    assert reward.read(images) == words
    assert reward.score(images, [sign(text.lower()) for text in words], [{}] * 4) == [1.0] * 4
    wrong = reward.score(images, [sign("HALLO"), sign("Widow"), sign("dog"), sign("BRIDGES")], [{}] * 4)
    assert wrong == pytest.approx([4 / 5, 4 / 5, 0, 6 / 7])


def test_a_score_does_not_depend_on_the_batch(words):
    images = [render(text, canvas=(64, width)) for text, width in zip(words, (200, 256, 330, 400))]
    reader = OCR(mode="word").reader
    together = reader.probabilities(images)
    for image, found in zip(images, together):
        np.testing.assert_allclose(reader.probabilities([image])[0], found, atol=1e-5)


def test_scene_mode_reads_what_rapidocr_reads():
    from rapidocr import RapidOCR

    image = np.full((200, 360, 3), 255, dtype=np.uint8)
    image[10:74, 40:296] = render("COFFEE", canvas=(64, 256))
    image[110:174, 60:316] = render("open daily", font="DejaVuSerif", canvas=(64, 256))
    engine = RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False})
    expected = " ".join(engine(np.ascontiguousarray(image[..., ::-1])).txts)
    reward = OCR(mode="scene")
    assert reward.read(image[None]) == [expected]
    assert normalized(expected) == "coffeeopendaily"
    assert reward.score(image[None], [sign("Open Daily")], [{}]) == [1.0]
    assert normalized(OCR(mode="scene", side=320).read(image[None])[0]) == "coffeeopendaily"


@pytest.mark.parametrize("mode", ["word", "scene"])
def test_blank_and_noise_score_nothing(mode):
    rng = np.random.default_rng(0)
    images = np.stack(
        [
            np.full((64, 128, 3), 255, dtype=np.uint8),
            np.zeros((64, 128, 3), dtype=np.uint8),
            *rng.integers(0, 256, (3, 64, 128, 3), dtype=np.uint8),
        ]
    )
    assert OCR(mode=mode).score(images, [sign("CAT")] * 5, [{}] * 5) == [0.0] * 5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mode": "line"}, "mode: expected scene or word, got 'line'"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"side": 8}, "side: expected at least 32 pixels, got 8"),
        ({"confidence": 2}, "confidence: expected 0 to 1, got 2"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        OCR(**settings)


def test_the_likelihood_by_counting_alignments():
    """Uniform over 3 classes: the number of alignments times 3^-frames."""
    dense, uniform = OCRDense(), np.full((3, 3), 1 / 3)
    dense.fold = {kind: [kind] for kind in range(3)}

    def likelihood(frames, target):
        return np.exp(dense.log_likelihood(uniform[:frames], target))

    # of length 3 that read "1": 111, 011, 110, 010, 100, 001 -> 6
    assert likelihood(3, [1]) == pytest.approx(6 / 27)
    assert likelihood(3, [1, 1]) == pytest.approx(1 / 27)  # 101 alone
    assert likelihood(2, [1, 1]) == 0  # two frames cannot hold a repeated character


def test_dense_merges_case_and_takes_a_space_for_a_blank():
    classes, fold = folded_classes(["blank", "a", "A", "b", "İ", " "])
    assert fold[0] == [0, 5] and fold[classes["a"]] == [1, 2] and fold[classes["b"]] == [3]
    assert set(classes) == {"a", "b"}  # the lower case of İ is two characters


def test_dense_ranks_pictures_that_the_hard_score_cannot_tell_apart():
    """A wanted word fades out of the picture: the likelihood falls all the way."""
    faded = np.stack(
        [(255 - (255 - render("HELLO").astype(float)) * ink).astype(np.uint8) for ink in (1, 0.1, 0.02, 0)]
    )
    dense = OCRDense()
    scores = dense.score(faded, [sign("hello")] * 4, [{}] * 4)
    assert scores[0] > 0.99 and scores[0] >= scores[1] > scores[3] > 0
    assert all(0 <= score <= 1 for score in scores)
    other = dense.score(faded[:1].repeat(3, 0), [sign("HELLO"), sign("HALLO"), sign("window")], [{}] * 3)
    assert other[0] > other[1] > other[2]
    total = OCRDense(reduction="total").score(faded[:1], [sign("HALLO")], [{}])
    assert total[0] < other[1]  # the whole text's likelihood is the product over its characters
    assert OCRDense(mode="scene").score(faded[:1], [sign("HELLO")], [{}])[0] > 0.95


def test_dense_is_the_likelihood_that_torch_finds():
    dense, image = OCRDense(scale=3.0), render("cat")
    probabilities = torch.from_numpy(dense.reader.probabilities([image])[0]).double()
    characters = dense.reader.characters
    space = characters.index(" ")
    folded = [probabilities[:, 0] + probabilities[:, space]]
    for letter in "cow":
        folded.append(sum(probabilities[:, i] for i, c in enumerate(characters) if c.lower() == letter))
    log_likelihood = -torch.nn.functional.ctc_loss(
        torch.stack(folded, 1).log()[:, None],
        torch.tensor([[1, 2, 3]]),
        torch.tensor([len(probabilities)]),
        torch.tensor([3]),
        reduction="sum",
    )
    expected = 3.0 / (3.0 - float(log_likelihood) / 3)
    assert dense.score(image[None], [sign("COW")], [{}])[0] == pytest.approx(expected, rel=1e-6)


def test_dense_refuses_what_the_recogniser_cannot_spell():
    with pytest.raises(UserError, match="does not know '\U00013000'"):
        OCRDense().check([{"prompt": sign("\U00013000")}])


def test_dense_spells_what_the_recogniser_knows_in_another_form():
    dense = OCRDense()
    assert dense.spell("ａ sign “Don’t”") == dense.spell(sign("Don't"))
    assert dense.spell(sign("ＯＰＥＮ")) == dense.spell(sign("open"))
