"""The second reader: its network and file, words that are rendered, and judges that may be absent."""

import string

import numpy as np
import pytest
import torch
import yaml

from crd_fast.errors import MissingPackage, UserError
from crd_fast.rewards import Rewards
from crd_fast.rewards import easyocr as module
from crd_fast.rewards.easyocr import CHARACTERS, EasyOCR, Recognizer, best_path, line_tensor, trimmed
from tests.cli.conftest import SMALL, metrics
from tests.rewards.conftest import assert_refused
from tests.rewards.test_ocr import render, sign


@pytest.fixture
def without(monkeypatch):
    """The package that carries the weights is not installed."""
    monkeypatch.setitem(__import__("sys").modules, "easyocr_en_models", None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Random weights under the names that EasyOCR's file has."""
    torch.manual_seed(0)
    weights = {f"module.{name}": tensor for name, tensor in Recognizer().state_dict().items()}
    shapes = {name: tuple(weights[name].shape) for name in weights}
    assert shapes["module.FeatureExtraction.ConvNet.0.weight"] == (32, 1, 3, 3)
    assert shapes["module.SequenceModeling.0.rnn.weight_hh_l0_reverse"] == (1024, 256)
    assert shapes["module.SequenceModeling.1.linear.bias"] == (256,)
    assert shapes["module.Prediction.weight"] == (97, 256)
    path = tmp_path_factory.mktemp("easyocr") / "english_g2.pth"
    torch.save(weights, path)
    return path


def test_every_weight_of_the_file_finds_its_place(file):
    torch.manual_seed(1)
    network = module.load_recognizer(str(file))
    weights = torch.load(file, weights_only=True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(weights.pop(f"module.{name}"), tensor)
    assert not weights
    assert not network.training
    with torch.no_grad():
        assert network(torch.zeros(2, 1, 64, 96)).shape == (2, 23, 97)


def test_files_that_are_none(file, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"module.Prediction.weight": torch.zeros(97, 256)}, tmp_path / "half.pth")
    for path in (tmp_path / "text.pth", tmp_path / "half.pth", tmp_path / "none.pth"):
        with pytest.raises(UserError, match=f"expected EasyOCR's english_g2.pth at {path}") as error:
            EasyOCR(path=str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="confidence: expected 0 to 1, got 2"):
        EasyOCR(confidence=2, path=str(file))


def test_runs_of_a_class_are_one_character_and_blanks_part_them():
    assert len(set(CHARACTERS)) == 96 and set(string.printable[:95]) < set(CHARACTERS)
    frames = [0, 5, 5, 0, 5, 7, 7, 7, 0, 0]
    probabilities = np.full((len(frames), 97), 0.001)
    probabilities[np.arange(len(frames)), frames] = 0.9
    probabilities[4, 5] = 0.6
    text, confidence = best_path(probabilities)
    assert text == CHARACTERS[4] * 2 + CHARACTERS[6] and confidence == pytest.approx((0.9 + 0.6 + 0.9) / 3)
    assert best_path(np.eye(97)[np.zeros(4, dtype=int)]) == ("", 0.0)


def test_a_line_is_as_high_as_the_network_wants_it():
    image = np.zeros((20, 51, 3), dtype=np.uint8)
    image[:, 26:] = 255
    line = line_tensor(image)  # 25 columns of ink, 20 high, and a margin of 4: 28 x 33
    assert line.shape == (1, 64, 96) and line.dtype == torch.float32
    assert line.min() == -1 and bool((line[..., 76:] == 1).all()) and line[0, :, 0].max() == -1


def test_the_margin_is_the_same_wherever_the_word_stands():
    canvas = np.full((40, 120), 200, dtype=np.uint8)
    canvas[20:30, 50:90] = 10
    assert trimmed(canvas).shape == (14, 44)  # cut
    tight = trimmed(canvas[19:31, 49:91])  # repeated
    assert tight.shape == (14, 44)
    flat = np.full((5, 7), 90, dtype=np.uint8)
    assert trimmed(flat) is flat


def test_a_score_does_not_depend_on_the_batch(file):
    reader = EasyOCR(path=str(file))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20, width, 3), dtype=np.uint8) for width in (30, 64, 30, 90)]
    together = reader.read_lines(images)
    for image, (text, confidence) in zip(images, together):
        (alone,) = reader.read_lines([image])
        assert alone[0] == text and alone[1] == pytest.approx(confidence, abs=1e-5)


def test_words_are_read():
    pytest.importorskip("easyocr_en_models", reason="needs pip install 'crd-fast[easyocr]'")
    words = ["HELLO", "Window", "cat", "BRIDGE"]
    images = np.stack([render(text) for text in words])
    reward = EasyOCR()
    assert reward.read(images) == words
    assert reward.score(images, [sign(text.lower()) for text in words], [{}] * 4) == [1.0] * 4
    wrong = reward.score(images, [sign("HALLO"), sign("Widow"), sign("dog"), sign("BRIDGES")], [{}] * 4)
    assert wrong == pytest.approx([4 / 5, 4 / 5, 0, 6 / 7])
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 128, 3), dtype=np.uint8)
    assert reward.score(np.concatenate([noise, noise[:1] * 0]), [sign("CAT")] * 9, [{}] * 9) == [0.0] * 9


def test_without_the_package_it_says_how_to_get_it(without):
    with pytest.raises(
        MissingPackage, match=r"easyocr_en_models is missing; pip install 'crd-fast\[easyocr\]'"
    ):
        Rewards({"easyocr": {}})


def test_a_judge_may_be_left_out_and_a_reward_may_not(without, caplog):
    judges = Rewards({"easyocr": {"optional": True}, "diversity": {}}, judges=True)
    assert list(judges.weights) == ["diversity"] and "judge easyocr is left out: " in caplog.text
    with pytest.raises(MissingPackage):
        Rewards({"easyocr": {"optional": False}}, judges=True)
    with pytest.raises(
        UserError, match=r"reward diversity: optional: expected of judges \(eval_rewards\) alone"
    ):
        Rewards({"diversity": {"optional": True}})
    with pytest.raises(UserError, match="optional: expected true or false, got 1"):
        Rewards({"diversity": {"optional": 1}}, judges=True)


def test_a_run_goes_on_without_an_optional_judge(without, inside, tmp_path, caplog):
    recipe = yaml.safe_load(SMALL) | {"eval_rewards": {"easyocr": {"optional": True}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = inside("train", tmp_path / "small.yaml", "--output", tmp_path / "run")
    assert code == 0, err
    assert caplog.text.count("judge easyocr is left out") == 1
    logged = {name for record in metrics(tmp_path / "run") for name in record}
    assert "eval/overall" in logged and not any("judge" in name for name in logged)
    recipe["eval_rewards"]["easyocr"] = {}
    (tmp_path / "strict.yaml").write_text(yaml.safe_dump(recipe))
    assert_refused(
        inside("train", tmp_path / "strict.yaml", "--output", tmp_path / "strict"),
        "reward easyocr: easyocr_en_models is missing",
    )
