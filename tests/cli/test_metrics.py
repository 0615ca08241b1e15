"""metrics.jsonl as it is read: a last line that a kill cut off, and lines that are damaged."""

import pytest

from crd_fast.errors import UserError
from crd_fast.run.metrics import read_metrics

FIRST, SECOND = '{"iteration": 1, "kl": 0.5}', '{"iteration": 2, "kl": 0.25}'


def written(folder, *lines):
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_no_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    run = written(tmp_path, FIRST, SECOND[:14])
    left_out = []
    assert read_metrics(run) == read_metrics(run, left_out) == [{"iteration": 1, "kl": 0.5}]
    assert left_out == [2]


def test_of_two_with_one_iteration_the_later_counts(tmp_path):
    run = written(tmp_path, SECOND, FIRST, "", SECOND.replace("0.25", "0.125"), "")
    assert [record["kl"] for record in read_metrics(run)] == [0.5, 0.125]


@pytest.mark.parametrize("line", [SECOND[:14], "[1, 2]", '{"kl": 1}', '{"iteration": "3"}'])
def test_a_damaged_line_before_others_is_an_error_unless_they_are_asked_for(tmp_path, line):
    run = written(tmp_path, FIRST, line, SECOND)
    with pytest.raises(UserError, match="line 2"):
        read_metrics(run)
    left_out = []
    assert [record["iteration"] for record in read_metrics(run, left_out)] == [1, 2] and left_out == [2]
