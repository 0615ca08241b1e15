"""What a person sees while a run goes."""

import io

import pytest
from rich.console import Console

from crd_fast.run.progress import Bars, before_and_after
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
    code, out, err = inside("train", small, "--output", run, *options)
    assert [record["iteration"] for record in metrics(run)] == list(range(7))
    assert code == 0 and "was not written by crd-fast" in err
    assert "weights: " in out and "crd-fast eval" in out
    assert caplog.text.count("the report is not written until the run has ended") == 1
    assert (run / "report.html").read_text() == "mine"


# --- the terminal


def test_the_base_is_printed_before_training(inside, small, tmp_path):
    run = tmp_path / "run"
    code, out, err = inside("train", small, "--output", run, "--max-iterations", 1)
    assert code == 0, err
    first, lines = metrics(run)[0], out.splitlines()
    shown = [f"held-out {first[f'{kind}/overall']:.3f} clean {first[f'{kind}/clean']:.3f}" for kind in KINDS]
    start = lines.index(f"before training, 6 images: {shown[0]}")
    assert lines[start + 1] == f"the base with guidance 4.5: {shown[1]}"
    assert start + 1 < next(i for i, line in enumerate(lines) if line.startswith("iteration "))

    # every measure of the table is on one line, with its values
    table = lines[next(i for i, line in enumerate(lines) if "Held-out prompts" in line) :]
    names = [
        name.removeprefix("eval/") for name in first if name.startswith("eval/") and name != "eval/images"
    ]
    assert "reward_mean" in names and "reward/geneval" in names
    for name in names:
        (row,) = [line.split() for line in table if line.startswith(f"{name} ")]
        assert row[1] == f"{first[f'eval/{name}']:.3f}"
        assert f"{first[f'guided_base/{name}']:.3f}" in row[4:]
    assert all(len(line) <= 80 for line in table[: len(names) + 4]) and "…" not in out


KINDS = ("eval", "guided_base")


@pytest.mark.parametrize(
    "name, value", [("reward/ocr", 0.5), ("judge/brightness", -12345.678), (f"judge/{'long_' * 9}", 0.5)]
)
def test_nothing_of_the_last_table_is_cut_at_80_columns(tmp_path, name, value):
    first = {"iteration": 0, f"eval/{name}": value, f"guided_base/{name}": value + 1}
    first["guided_base/guidance_scale"] = 4.5
    records = [first, {"iteration": 12000, f"eval/{name}": value + 2}]
    console = Console(width=80, file=io.StringIO())
    console.print(before_and_after(tmp_path, records))
    lines = console.file.getvalue().splitlines()
    rows = [line.split() for line in lines]
    end = next(i for i, row in enumerate(rows) if f"{value:.3f}" in row)
    assert rows[end][1:6] == [f"{value:.3f}", f"{value + 2:.3f}", "+2.000", f"{value + 1:.3f}", "+1.000"]
    assert "".join(row[0] for row in rows[: end + 1] if row).endswith(name)  # folded where it is long
    assert all(len(line) <= 80 and "…" not in line for line in lines)


def test_shares_that_were_scored_are_in_the_last_table_where_one_is_not_all(tmp_path):
    first = {"iteration": 0, "eval/scored/judge/vlm": 0.875, "eval/judge/vlm": 0.5}
    last = {"iteration": 9, "eval/scored/judge/face": 0.25, "eval/judge/vlm": 0.5, "eval/judge/face": 0.125}
    console = Console(width=80, file=io.StringIO())
    console.print(before_and_after(tmp_path, [first, last]))
    rows = {row[0]: row[1:] for line in console.file.getvalue().splitlines() if (row := line.split())}
    assert rows["scored/judge/vlm"] == ["0.875", "1.000", "+0.125"]
    assert rows["scored/judge/face"] == ["1.000", "0.250", "-0.750"]
    assert rows["judge/face"] == ["0.125"]  # of the last one alone


def test_a_reward_that_reports_overall_alone():
    """The built-in worlds have clean beside it; a reward of one's own need not."""
    console = Console(file=io.StringIO(), width=80)
    with Bars(console, 10) as bars:
        bars.evaluated({"iteration": 0, "eval/images": 4, "eval/overall": 0.5, "eval/reward_mean": 1.0})
        bars.evaluated({"iteration": 0, "eval/overall": 0.5, "eval/clean": 0.25})
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "before training, 4 images: held-out 0.500"
    assert lines[1].endswith(": held-out 0.500 clean 0.250")


def test_nothing_of_the_bars_is_cut_at_80_columns():
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    seconds = {f"seconds_{name}": 30.0 for name in ("rollout", "reward", "update")}
    with Bars(console, 12000) as bars, bars.phase("evaluation", 1152):
        bars.advance(1000)
        bars.iteration_done({"iteration": 9999, "reward_mean": -26.512, "kl": 12.3456, **seconds})
        bars._bars.refresh()
    text = console.file.getvalue()
    assert "reward -26.512  KL 12.3456" in text and "9999/12000" in text and "…" not in text
