"""What the targets would run."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make(*arguments, **environment):
    """The commands that it would run for a user, whatever a `make test` around this process was given."""
    given = ("MAKEFLAGS", "MAKELEVEL", "VENV", "PYTHON")
    without = {name: value for name, value in os.environ.items() if name not in given}
    command = ["make", "--dry-run", "--always-make", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**without, **environment}, capture_output=True, text=True, check=True
    ).stdout


def test_a_second_environment_leaves_the_first_alone():
    """Makes it, its hub folder and the tests in it, and removes nothing but it."""
    said = make("test", "clean", "VENV=build/other", "PYTHON=python")
    assert "python -m venv build/other\n" in said and "--target build/other/hub" in said
    assert "build/other/bin/python -m pytest" in said and "rm -rf build/other " in said
    assert ".venv" not in said


def test_a_python_that_does_not_run_is_passed_over(tmp_path):
    """A version manager leaves one on the path for each that it has, whether it is chosen or not."""
    for name, status in (("python3.11", 127), ("python3.12", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    said = make("env", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert said.startswith("python3.12 -m venv .venv\n")
