"""What is written where a command line says: nothing over anything, and nothing in part."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from crd_fast.errors import UserError
from crd_fast.run.new_files import check_new, made_beside, write_new


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
