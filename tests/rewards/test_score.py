"""`crd-fast score`: a reward alone on a folder of pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.rewards import registry
from crd_fast.rewards.pictures import image_paths, pairs, score_pictures
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


def test_a_setting_that_json_does_not_have_is_written_as_text(inside, mine, folder):
    (folder / "since.py").write_text(
        "def since(images, prompts, metadata, day): return [1.0] * len(images)\n"
    )
    command = ["score", "--images", "images", "--prompts", "prompts.txt", "--json", "scores.json"]
    code, _, err = inside(*command, "--reward", "since.py:since", "--set", "day=2024-01-01")
    assert code == 0, err
    assert json.loads((folder / "scores.json").read_text())["settings"] == {"day": "2024-01-01"}


def test_a_file_with_a_dot_in_its_name_is_refused(inside, mine, folder):
    (folder / "my.v2.py").write_text("def mine(images, prompts, metadata): return [1.0] * len(images)\n")
    found = inside("score", "--images", "images", "--prompts", "prompts.txt", "--reward", "my.v2.py:mine")
    assert_refused(found, "expected a file without a dot before .py; rename my.v2.py")


def test_pictures_of_one_prompt_are_scored_together(tmp_path, monkeypatch):
    """In whatever order they come: diversity is among those of a prompt."""
    monkeypatch.setattr(registry, "CALL_IMAGES", 2)
    random, entries = np.random.default_rng(0), []
    for i in range(6):
        picture = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        entries.append({"image": f"{i}.png", "prompt": "ab"[i % 2]})
    found = []
    for order in (entries, sorted(entries, key=lambda entry: entry["prompt"])):
        (tmp_path / "all.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in order))
        scored = score_pictures("diversity", {}, tmp_path / "all.jsonl", None)
        assert [entry["image"] for entry in scored] == [entry["image"] for entry in order]
        found.append({entry["image"]: entry["score"] for entry in scored})
    assert found[0] == found[1] and all(found[0].values())


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


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def lines(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def named(found):
    return [(name, entry["prompt"]) for name, _, entry in found]


def refused(words, *arguments):
    with pytest.raises(UserError, match=words) as error:
        pairs(*arguments)
    assert "\n" not in str(error.value)


@pytest.fixture
def geneval(tmp_path):
    """Three folders as GenEval's, in another order as text than as numbers."""
    for number in (9, 10, 100):
        for sample in range(2):
            touch(tmp_path / "out" / str(number) / "samples" / f"{sample:04d}.png")
        touch(tmp_path / "out" / str(number) / "grid.png")
        lines(tmp_path / "out" / str(number) / "metadata.jsonl", {"prompt": f"prompt {number}", "tag": "a"})
    return tmp_path / "out"


GENEVAL = [(f"{n}/samples/{i:04d}.png", f"prompt {n}") for n in (9, 10, 100) for i in range(2)]


def test_genevals_folders_come_with_their_prompts(geneval, tmp_path):
    assert named(pairs(geneval, None)) == GENEVAL
    others = lines(tmp_path / "p.jsonl", *({"prompt": f"prompt {number}"} for number in (9, 10, 100)))
    refused("expected none beside .*9/metadata.jsonl; leave one of them out", geneval, others)
    (geneval / "9" / "samples" / "0000.png").rename(geneval / "9" / "0000.png")
    (geneval / "9" / "samples" / "0001.png").unlink()
    refused("9/samples: expected pictures", geneval, None)
    lines(geneval / "9" / "metadata.jsonl", {"prompt": "a"}, {"prompt": "b"})
    refused("9/metadata.jsonl: expected one prompt, got 2", geneval, None)
    (geneval / "9" / "metadata.jsonl").unlink()
    refused("9/metadata.jsonl: no such file", geneval, None)


def test_a_manifest_says_which_prompt_is_whose(tmp_path):
    folder = tmp_path / "images"
    for number in (1, 2, 10):
        touch(folder / f"{number}.png")
    said = [{"image": f"{number}.png", "prompt": f"prompt {number}"} for number in (1, 10, 2)]
    expected = [(entry["image"], entry["prompt"]) for entry in said]
    assert named(pairs(folder, lines(tmp_path / "p.jsonl", *said))) == expected
    assert named(pairs(lines(folder / "m.jsonl", *said), None)) == expected
    (folder / "m.jsonl").rename(folder / "metadata.jsonl")
    assert named(pairs(folder, None)) == expected
    refused("expected none beside .*metadata.jsonl; leave one of them out", folder, tmp_path / "p.jsonl")


def test_manifests_that_do_not_fit_are_refused(tmp_path):
    folder, path = tmp_path / "images", tmp_path / "p.jsonl"
    for number in (1, 2):
        touch(folder / f"{number}.png")
    one, two = ({"image": f"{number}.png", "prompt": "a"} for number in (1, 2))
    refused("expected every picture, 2.png is not named", folder, lines(path, one))
    refused(
        "3.png: expected a picture in .*images, found none",
        folder,
        lines(path, one, two | {"image": "3.png"}),
    )
    refused("expected an `image` beside every prompt, got", folder, lines(path, one, {"prompt": "a"}))
    refused("expected an `image` beside every prompt, got", folder, lines(path, one, two | {"image": 2}))
    refused("expected none beside .*m.jsonl", lines(folder / "m.jsonl", one), path)
    refused("expected a file, as .*images has no metadata.jsonl", folder, None)
    refused("expected a folder or a .jsonl manifest", folder / "1.png", None)
