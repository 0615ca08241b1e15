"""Paths to write to, of any kind: something new is written, or one line says why not; nothing is lost."""

import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crd_fast.config import build_recipe
from crd_fast.run.lock import RunLock
from crd_fast.run.log import FILES, SMALLEST_SPACE, RunLog, refuse_existing, refuse_full
from tests.fuzz.budget import REFUSED, TRIED, answer, cases

KNOWN = (
    *("..", ".", "~", " ", "-x", "\\"),
    *("a" * 255, "a" * 256, "é" * 128, ":two:", "[red]x[/red]", "a b", "a'b\"c", "$(x)", "*", "\n"),
    *("\x1b[2J", "\udcff", "new.json", "config.yaml", "recipe.yaml", "metrics.jsonl", "run.lock"),
    "checkpoints",
)
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/\0")
THERE = ("file", "folder", "full", "nowhere", "linked", "loop", "fifo")
NAMES = st.sampled_from(THERE) | st.sampled_from(KNOWN) | st.text(LETTERS, min_size=1, max_size=8)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


def populated(folder):
    """Files, folders and links of somebody's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "file").write_text("mine")
    (folder / "folder").mkdir()
    (folder / "folder" / "recipe.yaml").symlink_to("nowhere")
    (folder / "full").mkdir()
    for name in ("config.yaml", "recipe.yaml", "new.json"):
        (folder / "full" / name).write_text("mine")
    (folder / "nowhere").symlink_to("nothing/there")
    (folder / "linked").symlink_to("folder")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    return folder


def content(folder):
    """What there is, by path: text, where a link leads to, or what else it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = ("link", os.readlink(path))
        elif path.is_file():
            found[path] = path.read_bytes()
        else:
            found[path] = "folder" if path.is_dir() else "other"
    return found


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "0.png")
    (tmp_path / "p.txt").write_text("a red circle\n")
    return tmp_path


def begun(path):
    """A run's folder, with all that a run begins with."""
    refuse_existing(path)
    refuse_full(path, SMALLEST_SPACE)
    lock = RunLock(path)
    RunLog(path, build_recipe({"train": {"trackers": []}})).close()
    lock.close()
    return {path / "run.lock", *(path / name for name in FILES)}


@cases(60)
@given(where=PATHS)
def test_a_run_begins_or_says_why_not(home, where):
    folder = populated(home / "here")
    before = content(folder)
    answer("output paths", begun, folder / where)
    after = content(folder)
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("command", ["score", "init"])
@cases(40)
@given(where=PATHS)
def test_commands_write_what_is_new_or_say_why_not(home, inside, command, where):
    folder = populated(home / "here")
    before = content(folder)
    path = folder / where
    if command == "score":
        arguments = ("score", "--reward", "colorfulness", "--images", home / "pictures")
        arguments += ("--prompts", home / "p.txt", "--json", path)
    else:
        arguments = ("init", path, "--model", "builtin")
    TRIED["output paths"] += 1
    code, _, errors = inside(*arguments)
    after = content(folder)
    assert {path: after.get(path) for path in before} == before
    if code == 0:
        assert len(after) > len(before) or ".." in where
        return
    REFUSED["output paths"] += 1
    assert code == 2 and len(errors.splitlines()) == 1, errors
    assert "traceback in" not in errors  # an answer that was thought of
