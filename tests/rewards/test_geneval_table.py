"""GenEval's rules against a table labelled by hand."""

import pytest

from crd_fast.rewards.geneval import judge
from tests.rewards.geneval_cases import CASES


@pytest.mark.parametrize(
    "why, metadata, detections, correct, strict, score",
    CASES,
    ids=[f"{case[1]['tag']}: {case[0]}" for case in CASES],
)
def test_agrees_with_the_label(why, metadata, detections, correct, strict, score):
    judged = judge(detections, metadata)
    assert (judged.correct, judged.strict_correct) == (correct, strict), judged.reason
    assert judged.score == pytest.approx(score)


def test_table_covers_every_category():
    tags = [case[1]["tag"] for case in CASES]
    assert len(tags) >= 60
    for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr"):
        assert tags.count(tag) >= 8
    assert {case[3] for case in CASES} == {case[4] for case in CASES} == {True, False}


def test_order_of_the_detections_does_not_matter():
    for why, metadata, detections, correct, strict, score in CASES:
        scores = [detection["score"] for detection in detections]
        if len(set(scores)) == len(scores):  # equal scores are taken in the order given
            judged = judge(detections[::-1], metadata)
            assert (judged.correct, judged.strict_correct) == (correct, strict), why
            assert judged.score == pytest.approx(score), why
