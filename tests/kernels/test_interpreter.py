"""Every Triton kernel on machines without a GPU: the tests marked gpu, run by Triton's interpreter.

The interpreter must be chosen before triton is imported, hence a pytest of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this is the inner run", allow_module_level=True)
pytest.importorskip("triton")


FOLDER = Path(__file__).parent
# Each file in a process of its own, so that the longest ones can run beside each other.
FILES = sorted(
    path.name
    for path in FOLDER.glob("test_*.py")
    if "(impl" in path.read_text(encoding="utf-8") and path.name != Path(__file__).name
)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_triton_kernels_under_the_interpreter(file):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(FOLDER / file),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:]
    assert " passed" in run.stdout
