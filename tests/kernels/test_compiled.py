"""Every public function under torch.compile against eager: compiled_ops.py in a process of its own.

As it comes, whole, with open shapes, with a broken graph around it, with settings that change at every step,
and exported.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled_ops.py")
NAMES = ["crd", "nft", "awm", "dpo", "flow_matching", "implicit_reward", "steps", "interpolate"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name):
    run = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "ok"), run.stdout[-2000:] + run.stderr[-8000:]
