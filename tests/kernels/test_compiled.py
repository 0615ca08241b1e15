"""Every public function under torch.compile against eager: compiled_ops.py in processes of its own.

As it comes, whole, with open shapes, with a broken graph around it, with settings that change at every step,
and exported.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled_ops.py")
# torch's compiler takes seconds to import: several in each, in two that can run beside each other
HALVES = ["crd nft awm dpo", "flow_matching implicit_reward steps interpolate"]


@pytest.mark.slow
@pytest.mark.parametrize("names", HALVES)
def test_compiled_equals_eager(names):
    run = subprocess.run([sys.executable, str(SCRIPT), *names.split()], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, names.split()), run.stdout + run.stderr[-8000:]
