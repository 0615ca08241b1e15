"""Dynamo never compiles what an operator runs: it would free tensors whose addresses C still has."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "opaque_bodies.py"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["inductor"], ["eager", "older"]], ids=["inductor", "older torch"])
def test_bodies_are_opaque(arguments):
    run = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("opaque: ")
