"""OpenMP's threads soon sleep where they wait, wherever a command starts, unless the user says otherwise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).with_name("crd-fast")
COLLECTED = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--collect-only"]
STARTS = {
    "crd-fast": [SCRIPT, "doctor"],
    "python -m crd_fast": [sys.executable, "-m", "crd_fast", "doctor"],
    "a tool": [sys.executable, "-m", "tools.pretrain_builtin", "--help"],
    "a benchmark": [sys.executable, "-m", "benchmarks.measure_iteration", "--help"],
    "tests": [sys.executable, *COLLECTED, "tests/training/test_rollout.py"],
    "pytest benchmarks": [sys.executable, *COLLECTED, "benchmarks/test_other_ops.py"],
}


def spins_of(command, **environment):
    """How often a waiting thread looks before it sleeps, as the OpenMP runtime says when torch loads it.

    What the command does after that is ended: it would import the rest.
    """
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    running = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=unset | {"OMP_DISPLAY_ENV": "VERBOSE", "NO_COLOR": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    for line in running.stderr:
        said += line
        if "OPENMP DISPLAY ENVIRONMENT END" in line:
            break
    running.kill()
    running.communicate()
    found = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", said)
    if not found and "OMP_NUM_THREADS" not in said:
        raise AssertionError(said[-2000:])
    if not found:
        pytest.skip("another OpenMP runtime than GNU's")
    return {int(count) for count in found}


@pytest.mark.parametrize("start", STARTS)
def test_threads_soon_sleep_where_they_wait(start):
    assert spins_of(STARTS[start]) == {1000}


def test_the_users_own_policy_is_kept():
    own = spins_of(STARTS["python -m crd_fast"], OMP_WAIT_POLICY="ACTIVE")
    assert own == spins_of([sys.executable, "-c", "import torch"], OMP_WAIT_POLICY="ACTIVE")
    assert min(own) > 1000
    assert spins_of(STARTS["python -m crd_fast"], GOMP_SPINCOUNT="7") == {7}
