"""GenEval's rules on what a real detector finds in photographs."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from crd_fast.rewards import geneval
from tests.rewards.centernet import SIDE, CenterNet, fetch

LEAST = 0.2  # a small network, and never very sure
SMALL = (SIDE * 5 // 12, SIDE // 2)


@pytest.fixture(scope="module")
def detect(tmp_path_factory):
    """What is found counts as certain: how sure this network is says nothing about the rules' thresholds."""
    network = CenterNet(fetch(tmp_path_factory.mktemp("centernet")))
    return lambda image: [found | {"score": 1.0} for found in network(np.array(image), LEAST)]


@pytest.fixture(scope="module")
def portrait():
    """An officer in uniform, with a tie; matplotlib ships it."""
    return Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB")


def placed(portrait, size, *corners):
    """So many copies on grey."""
    canvas = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    for corner in corners:
        canvas.paste(portrait.resize(size), corner)
    return canvas


def persons(count, **more):
    return {"tag": "counting", "include": [{"class": "person", "count": count}], **more}


@pytest.mark.slow
def test_what_a_real_detector_finds_is_judged(detect, portrait):
    alone = detect(placed(portrait, (SIDE * 5 // 6, SIDE), (40, 0)))
    both = {"tag": "two_object", "include": [{"class": name, "count": 1} for name in ("person", "tie")]}
    assert geneval.judge(alone, both).correct
    assert not geneval.judge(
        alone, {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    ).correct
    (person,) = (found["box"] for found in alone if found["label"] == "person")
    assert person == pytest.approx([40, 0, 40 + SIDE * 5 / 6, SIDE], abs=30)

    pair = detect(placed(portrait, SMALL, (20, 130), (280, 130)))
    assert geneval.judge(pair, persons(2)).strict_correct
    judgement = geneval.judge(pair, persons(3))
    assert not judgement.correct and judgement.reason == "expected at least 3 person, found 2"
    assert judgement.score == pytest.approx(2 / 3)
    assert not geneval.judge(pair, persons(1, exclude=[{"class": "person", "count": 2}])).correct
    left, right = sorted(found["box"] for found in pair if found["label"] == "person")
    assert geneval.relations(left, right) == {"left of"} and geneval.relations(right, left) == {"right of"}

    assert not detect(placed(portrait, SMALL))  # grey alone
