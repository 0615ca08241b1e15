"""`crd-fast score`: a reward alone on a folder of pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.rewards.pictures import image_paths
from tests.rewards.conftest import assert_refused


@pytest.fixture
def folder(tmp_path):
    """Three pictures of two sizes, named out of order, and their prompts."""
    images = tmp_path / "images"
    images.mkdir()
    for name, red, side in (("b.png", 51, 16), ("c.png", 255, 20), ("a.png", 0, 16)):
        Image.fromarray(np.full((side, side, 3), (red, 0, 0), dtype=np.uint8)).save(images / name)
    (tmp_path / "prompts.txt").write_text("black\ndark\nred\n")
    return tmp_path


def test_score_prints_a_table_and_writes_json(inside, mine, folder):
    command = ["score", "--images", "images", "--prompts", "prompts.txt", "--json", "scores.json"]
    code, out, err = inside(*command, "--reward", "mine:scaled", "--set", "scale=10")
    assert code == 0, err
    assert "mine:scaled: mean 4.0000 of 3 pictures" in out and "a.png" in out and "dark" in out
    assert json.loads((folder / "scores.json").read_text()) == {
        "reward": "mine:scaled",
        "settings": {"scale": 10},
        "mean": pytest.approx(4.0),
        "scores": [
            {"image": "a.png", "prompt": "black", "score": 0.0},
            {"image": "b.png", "prompt": "dark", "score": 2.0},
            {"image": "c.png", "prompt": "red", "score": 10.0},
        ],
    }
    assert_refused(inside(*command, "--reward", "mine:redness"), "--json scores.json: already exists")


def test_numbered_pictures_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("10.png", "2.png", "a10b.png", "a9b.png", "1.jpg", "001.webp"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"got .*1.* and .*1.* for one place"):
        image_paths(tmp_path)
    (tmp_path / "001.webp").unlink()
    found = [path.name for path in image_paths(tmp_path)]
    assert found == ["1.jpg", "2.png", "10.png", "a9b.png", "a10b.png"]


def test_score_refuses_in_one_line(inside, mine, folder):
    command = ["score", "--images", "images", "--prompts", "prompts.txt"]
    pytest.importorskip("rapidocr", reason="needs rapidocr and onnxruntime")
    assert_refused(inside(*command, "--reward", "ocr"), "expected a text in double quotes", "got 'black'")
    assert_refused(inside(*command, "--reward", "orc"), "did you mean 'ocr'?")
    assert_refused(
        inside(*command, "--reward", "ocr", "--set", "mod=word"),
        "unknown setting 'mod', did you mean 'mode'?",
    )
    assert_refused(inside(*command, "--reward", "ocr", "--set", "mode"), "expected KEY=VALUE, got 'mode'")
    assert_refused(
        inside(*command, "--reward", "mine:slow", "--set", "timeout=0.1"),
        "reward mine:slow: expected values within 0.1 s",
    )
    assert_refused(
        inside("score", "--images", "none", *command[3:], "--reward", "ocr"), "expected a folder of pictures"
    )
    (folder / "prompts.txt").write_text("black\ndark\n")
    assert_refused(
        inside(*command, "--reward", "mine:redness"), "expected 3 prompts, one for each picture, got 2"
    )
    (folder / "images" / "b.png").write_bytes(b"no picture")
    (folder / "prompts.txt").write_text("black\ndark\nred\n")
    assert_refused(inside(*command, "--reward", "mine:redness"), "b.png: cannot be read as a picture")
