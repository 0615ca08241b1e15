"""What is written where a command line says: nothing over anything, and nothing in part."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from crd_fast.commands.boundary import leaving_traceback
from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.run.log import RunLog
from crd_fast.run.new_files import check_new, made_beside, write_atomically, write_new


def test_a_file_that_comes_to_be_there_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "deep" / "new.json"
    check_new(path, "--json")
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        write_new(path, "--json", b"ours")
    assert path.read_text() == "mine"


def test_the_home_folder_is_where_the_shell_has_left_it(tmp_path, monkeypatch):
    """As it does in --json=~/found.json."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_new(Path("~/found.json"), "--json", b"{}")
    with made_beside(Path("~/lora"), "--out") as partial:
        partial.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "lora"}
    with pytest.raises(UserError, match="already exists"):
        check_new(Path("~/lora"), "--out")


@pytest.mark.parametrize("by", ["safetensors", "the system"])
def test_a_full_disk_is_said_of_what_was_to_be_written(tmp_path, by):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if by == "safetensors":
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    said, out = r"--out .*lora: cannot be written: .*No space left on device", tmp_path / "lora"
    with pytest.raises(UserError, match=said), made_beside(out, "--out") as partial:
        partial.mkdir()
        raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError), made_beside(out, "--out"):  # of what is read it says nothing
        (tmp_path / "none").read_bytes()


FULL = Path("/dev/full")  # takes no byte, as a full disk does


@pytest.mark.skipif(not FULL.exists(), reason="has no file that is always full")
def test_a_run_s_file_that_a_full_disk_does_not_take_is_named(tmp_path):
    """The system's error of a write has no name. What was there stays, and nothing in part."""
    page, metrics = tmp_path / "report.html", tmp_path / "run" / "metrics.jsonl"
    page.write_text("before")
    page.with_name("report.html.partial").symlink_to(FULL)
    log = RunLog(metrics.parent, load_recipe("builtin", ["train.trackers=[]"]))
    metrics.symlink_to(FULL)
    for path, write in ((page, lambda: write_atomically(page, "after")), (metrics, lambda: log.write({}))):
        said = rf"^{path}: No space left on device"
        with pytest.raises(UserError, match=said), leaving_traceback(tmp_path):
            write()
    assert page.read_text() == "before"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not FULL.exists(), reason="has no file that is always full")
def test_a_traceback_goes_elsewhere_whole_where_the_disk_is_full(tmp_path, monkeypatch):
    """The one of before stays in its place."""
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    run.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    (run / "error.txt").write_text("before")
    (run / "error.txt.partial").symlink_to(FULL)
    with pytest.raises(UserError) as raised, leaving_traceback(run):
        raise ZeroDivisionError("a reward's own")
    (written,) = elsewhere.iterdir()
    assert str(written) in str(raised.value) and "a reward's own" in written.read_text()
    assert [path.name for path in run.iterdir()] == ["error.txt"]
    assert (run / "error.txt").read_text() == "before"


@pytest.mark.parametrize("make", [torch.empty, np.empty], ids=["torch", "numpy"])
def test_memory_of_the_host_that_is_not_there_is_a_line_that_names_settings(tmp_path, make):
    with (
        pytest.raises(
            UserError, match=r"^out of memory on the host: .*rollout\.samples_per_prompt"
        ) as raised,
        leaving_traceback(tmp_path),
    ):
        make(10**16)
    assert str(tmp_path / "error.txt") in str(raised.value)
