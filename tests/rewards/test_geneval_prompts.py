"""GenEval's prompts over COCO's classes, in training, held out and in the benchmark's files."""

import json

import numpy as np
import pytest

from crd_fast.errors import UserError
from crd_fast.prompts import coco
from crd_fast.prompts.geneval_metadata import check_metadata, draw_prompts
from crd_fast.prompts.lists import PromptLists
from crd_fast.prompts.source import PromptSource, read_prompts
from crd_fast.prompts.world import TAGS


def test_prompts_are_the_benchmarks_wording():
    """Lines of the benchmark's own evaluation_metadata.jsonl."""
    assert coco.counting("bus", 3) == {
        "tag": "counting",
        "include": [{"class": "bus", "count": 3}],
        "exclude": [{"class": "bus", "count": 4}],
        "prompt": "a photo of three buses",
    }
    assert coco.position("bird", "left of", "couch") == {
        "tag": "position",
        "include": [
            {"class": "couch", "count": 1},
            {"class": "bird", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a bird left of a couch",
    }
    assert coco.color_attr("orange", "traffic light", "white", "toilet") == {
        "tag": "color_attr",
        "include": [
            {"class": "traffic light", "count": 1, "color": "orange"},
            {"class": "toilet", "count": 1, "color": "white"},
        ],
        "prompt": "a photo of an orange traffic light and a white toilet",
    }
    assert coco.single_object("umbrella")["prompt"] == "a photo of an umbrella"


def test_training_and_held_out_prompts_are_thousands_and_disjoint():
    train, held_out = (PromptSource(name).entries() for name in ("geneval", "geneval-heldout"))
    assert len(coco.CLASSES) == len(set(coco.CLASSES)) == 80
    for entries, at_least in ((train, 30_000), (held_out, 5_000)):
        assert len({entry["prompt"] for entry in entries}) == len(entries) > at_least
        assert {entry["tag"] for entry in entries} == set(TAGS)
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in held_out}

    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def reversed_prompt(entry):
        """The same content with its two objects the other way round."""
        first, second = entry["include"]
        if entry["tag"] == "position":
            return coco.position(first["class"], opposite[second["position"][0]], second["class"])
        if entry["tag"] == "two_object":
            return coco.two_object(second["class"], first["class"])
        return coco.color_attr(second["color"], second["class"], first["color"], first["class"])

    prompts = {entry["prompt"] for entry in train}
    turned = [
        reversed_prompt(e)["prompt"] for e in held_out if e["tag"] in ("two_object", "position", "color_attr")
    ]
    assert not prompts & set(turned)
    for entry in held_out[::50]:
        check_metadata(entry)


def test_training_prompts_without_those_of_a_file(tmp_path, monkeypatch):
    from tools.geneval_prompts import main

    taken = [coco.two_object("cat", "dog"), coco.position("cat", "below", "dog")]
    taken += [coco.counting("bus", 2), coco.color_attr("red", "dog", "blue", "cat")]
    (tmp_path / "benchmark.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in taken))
    arguments = [str(tmp_path / "train.jsonl"), "--without", str(tmp_path / "benchmark.jsonl")]
    monkeypatch.setattr("sys.argv", ["geneval_prompts", *arguments])
    main()
    written = {entry["prompt"] for entry in read_prompts(tmp_path / "train.jsonl")}
    every = {entry["prompt"] for entry in PromptSource("geneval").entries()}
    missing = every - written
    assert written < every and len(missing) <= 2 + 8 + 1 + 2
    gone = ("a photo of a cat and a dog", "a photo of a dog and a cat", "a photo of two buses")
    assert not written & {*gone, "a photo of a dog above a cat", "a photo of a cat left of a dog"}
    assert not any(" bus" not in p and " dog" not in p for p in missing)


def test_draws_give_every_category_its_share():
    drawn = draw_prompts(coco.prompts(True), np.random.default_rng(3), 60)
    assert [sum(entry["tag"] == tag for entry in drawn) for tag in TAGS] == [10] * 6
    assert len({entry["prompt"] for entry in drawn}) == 60
    assert drawn == draw_prompts(coco.prompts(True), np.random.default_rng(3), 60)
    assert (
        len(draw_prompts(coco.prompts(True), np.random.default_rng(0), 600)) == 600
    )  # more than single_object has


def test_from_a_recipe_by_name():
    train, held_out = PromptLists({"geneval": 1.0}), PromptSource("geneval-heldout")
    drawn = train.draw(12, seed=1, iteration=2)
    assert drawn == train.draw(12, seed=1, iteration=2) != train.draw(12, seed=1, iteration=3)
    assert {entry["tag"] for entry in drawn} == set(TAGS)
    assert len(held_out.all()) == 384 and held_out.all(12) == held_out.all(12)
    assert not {e["prompt"] for e in train.entries()} & {e["prompt"] for e in held_out.all()}


@pytest.mark.parametrize(
    "clauses, words",
    [
        ('"include": []', "line 2: include: expected a list of at least one"),
        ('"include": [{"count": 1}]', "line 2: include: expected clauses with a `class`"),
        ('"include": [{"class": "dog", "count": 0}]', "expected an integer >= 1, got 0"),
        ('"exclude": [{"class": "dog", "count": 1}]', "line 2: include: expected a list"),
        ('"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]', "line 2: include: `position`"),
        ('"include": [{"class": "dog", "count": 1, "color": 5}]', "line 2: include: `color`"),
    ],
)
def test_the_benchmarks_files_are_checked_by_line(tmp_path, clauses, words):
    path = tmp_path / "evaluation_metadata.jsonl"
    good = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}\n'
    path.write_text(good * 2)
    assert len(read_prompts(path)) == 2
    path.write_text(good + f'{{"tag": "colors", {clauses}, "prompt": "a dog"}}\n')
    with pytest.raises(UserError) as refused:
        read_prompts(path)
    assert words in str(refused.value) and str(path) in str(refused.value)
