"""GenEval's rules on hand-made detections, thresholds from both sides."""

import pytest

from crd_fast.rewards.geneval import judge, relations


def found(label, box=(0, 0, 10, 10), score=0.95, color=None):
    return {"label": label, "box": list(box), "score": score, "color": color}


def at(x, y, size=10):
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
ONE = {"tag": "single_object", "include": [DOG]}
TWO = {"tag": "two_object", "include": [DOG, CAT]}
THREE = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 3}],
    "exclude": [{"class": "dog", "count": 4}],
}
RED = {"tag": "colors", "include": [DOG | {"color": "red"}]}
LEFT = {"tag": "position", "include": [CAT, DOG | {"position": ["left of", 0]}]}
RED_LEFT = {"tag": "position", "include": [CAT, DOG | {"color": "red", "position": ["left of", 0]}]}
CHAIN = {"tag": "position", "include": [CAT | {"color": "red"}, DOG | {"position": ["left of", 0]}]}
BOTH = {"tag": "color_attr", "include": [DOG | {"color": "red"}, CAT | {"color": "blue"}]}

# name, metadata, detections, correct, strict_correct, clean, score
CASES = [
    ("one", ONE, [found("dog")], True, True, True, 1.0),
    ("nothing", ONE, [], False, False, False, 0.0),
    ("another class", ONE, [found("cat")], False, False, False, 0.0),
    ("score at the threshold does not count", ONE, [found("dog", score=0.3)], False, False, False, 0.0),
    ("score above the threshold", ONE, [found("dog", score=0.301)], True, True, True, 1.0),
    ("one too many is still correct", ONE, [found("dog"), found("dog")], True, False, False, 0.0),
    ("an extra class is not clean", ONE, [found("dog"), found("cat")], True, True, False, 1.0),
    ("partial credit may be negative", ONE, [found("dog")] * 3, True, False, False, -1.0),
    ("two", TWO, [found("dog"), found("cat")], True, True, True, 1.0),
    ("one of two", TWO, [found("dog")], False, False, False, 0.5),
    ("three", THREE, [found("dog")] * 3, True, True, True, 1.0),
    ("two of three", THREE, [found("dog")] * 2, False, False, False, 2 / 3),
    ("four of three are excluded", THREE, [found("dog")] * 4, False, False, False, 2 / 3),
    ("counting needs 0.9", THREE, [found("dog", score=0.9)] * 3, False, False, False, 0.0),
    (
        "an unsure fourth is not counted",
        THREE,
        [found("dog")] * 3 + [found("dog", score=0.5)],
        True,
        True,
        True,
        1.0,
    ),
    ("red", RED, [found("dog", color="red")], True, True, True, 1.0),
    ("blue", RED, [found("dog", color="blue")], False, False, False, 0.5),
    ("no colour", RED, [found("dog")], False, False, False, 0.5),
    ("wrong count costs the colour term", RED, [found("dog", color="red")] * 2, True, False, False, 0.0),
    (
        "the most confident is judged",
        RED,
        [found("dog", score=0.5, color="red"), found("dog", score=0.9, color="blue")],
        False,
        False,
        False,
        0.0,
    ),
    ("left", LEFT, [found("dog", at(0, 0)), found("cat", at(50, 0))], True, True, True, 1.0),
    ("right", LEFT, [found("dog", at(50, 0)), found("cat", at(0, 0))], False, False, False, 0.75),
    ("no target", LEFT, [found("dog", at(0, 0))], False, False, False, 1 / 3),
    (
        "two dogs cost the position term",
        LEFT,
        [found("dog", at(0, 0)), found("dog", at(9, 0)), found("cat", at(50, 0))],
        True,
        False,
        False,
        1 / 3,
    ),
    (
        "colour fails before position",
        RED_LEFT,
        [found("dog", at(0, 0), color="blue"), found("cat", at(50, 0))],
        False,
        False,
        False,
        2 / 3,
    ),
    (
        "colour and position",
        RED_LEFT,
        [found("dog", at(0, 0), color="red"), found("cat", at(50, 0))],
        True,
        True,
        True,
        1.0,
    ),
    (
        "the target's clause failed",
        CHAIN,
        [found("dog", at(0, 0)), found("cat", at(50, 0), color="blue")],
        False,
        False,
        False,
        0.5,
    ),
    ("both attributes", BOTH, [found("dog", color="red"), found("cat", color="blue")], True, True, True, 1.0),
    (
        "swapped attributes",
        BOTH,
        [found("dog", color="blue"), found("cat", color="red")],
        False,
        False,
        False,
        0.5,
    ),
]


@pytest.mark.parametrize(
    "name, metadata, detections, correct, strict, clean, score", CASES, ids=[c[0] for c in CASES]
)
def test_rules(name, metadata, detections, correct, strict, clean, score):
    judged = judge(detections, metadata)
    assert (judged.correct, judged.strict_correct, judged.clean) == (correct, strict, clean)
    assert judged.score == pytest.approx(score)
    assert bool(judged.reason) != judged.correct


def test_every_matched_object_must_stand_in_the_relation_to_every_target():
    metadata = {
        "tag": "position",
        "include": [{"class": "cat", "count": 2}, DOG | {"position": ["left of", 0]}],
    }
    cats = [found("cat", at(50, 0)), found("cat", at(90, 0))]
    assert judge([found("dog", at(0, 0)), *cats], metadata).correct
    assert not judge([found("dog", at(70, 0)), *cats], metadata).correct


def test_at_most_sixteen_objects_of_a_class():
    metadata = {"tag": "single_object", "include": [{"class": "dog", "count": 20}]}
    judged = judge([found("dog")] * 20, metadata)
    assert not judged.correct and "found 16" in judged.reason


@pytest.mark.parametrize(
    "box, expected",
    [
        (at(-30, 0), {"left of"}),
        (at(30, 0), {"right of"}),
        (at(0, -30), {"above"}),
        (at(0, 30), {"below"}),
        (at(-30, -30), {"left of", "above"}),
        (at(0, 0), set()),
        (at(-4, 0), set()),  # (4 - 2) / 4 = 0.5 is not beyond the cutoff
        (at(-2, 0), set()),
        (at(-30, 6), {"left of"}),
    ],
)
def test_relations(box, expected):
    assert relations(box, at(0, 0)) == expected


def test_relation_beyond_the_cutoff():
    assert relations(at(-4.1, 0), at(0, 0)) == {"left of"}  # (4.1 - 2) / 4.1 > 0.5


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"tag": "colors"}, "include: expected a list"),
        ({"include": []}, "include: expected a list"),
        ({"include": [{"count": 1}]}, "expected clauses with a `class`"),
        ({"include": [{"class": "dog", "count": 0}]}, "expected an integer >= 1, got 0"),
        ({"include": [DOG | {"position": ["near", 0]}]}, "`position`: expected"),
        ({"include": [DOG | {"position": ["left of", 0]}]}, "an earlier clause"),
    ],
)
def test_malformed_metadata_is_named(metadata, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        judge([], metadata)
