"""What a person sees while a run goes."""

import pytest

from tests.cli.conftest import metrics
from tests.cli.report_runs import Page

# fails once the second iteration is written down
REWARD = """
from pathlib import Path

def score(images, prompts, metadata):
    path = Path(__file__).parent / "run" / "metrics.jsonl"
    if path.exists() and '"iteration": 2,' in path.read_text():
        raise RuntimeError("enough")
    return images.mean(axis=(1, 2, 3)) / 255
"""


def test_the_page_is_that_of_the_last_evaluation(inside, small, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "mine.py").write_text(REWARD)
    settings = [f"rewards={{{tmp_path}/mine.py:score: 1.0}}", "train.iterations=6"]
    options = [option for setting in settings for option in ("--set", setting)]
    code, out, err = inside("train", small, "--output", run, *options)
    assert code == 2 and "enough" in err and "report:" not in out
    assert [record["iteration"] for record in metrics(run)] == [0, 1, 2]
    page = Page(run / "report.html")
    assert "This run has done 2 of 6 iterations." in page.text
    shown = page.row("Reward mean")[:2]
    for cell, record in zip(shown, (metrics(run)[0], metrics(run)[2]), strict=True):
        assert float(cell) == pytest.approx(record["eval/reward_mean"], abs=1e-3)


def test_a_page_that_cannot_be_written_does_not_end_the_run(inside, small, tmp_path, caplog):
    """Somebody else's page, put there while it runs; it is warned of once, and said at the end."""
    run = tmp_path / "run"
    (tmp_path / "mine.py").write_text(
        REWARD.replace('raise RuntimeError("enough")', '(path.parent / "report.html").write_text("mine")')
    )
    settings = [f"rewards={{{tmp_path}/mine.py:score: 1.0}}", "train.iterations=6"]
    options = [option for setting in settings for option in ("--set", setting)]
    code, _, err = inside("train", small, "--output", run, *options)
    assert [record["iteration"] for record in metrics(run)] == list(range(7))
    assert code == 2 and "was not written by crd-fast" in err
    assert caplog.text.count("the report is not written until the run has ended") == 1
    assert (run / "report.html").read_text() == "mine"
