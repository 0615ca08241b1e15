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
FILES = sorted(
    path.name
    for path in FOLDER.glob("test_*.py")
    if "(impl" in path.read_text(encoding="utf-8") and path.name != Path(__file__).name
)
# A process imports for seconds: several files in each, and so many that they can run beside each other.
GROUPS = [FILES[i::3] for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("files", GROUPS, ids=" ".join)
def test_triton_kernels_under_the_interpreter(files):
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [str(FOLDER / file) for file in files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:]
    assert [file for file in files if f"PASSED tests/kernels/{file}::" not in run.stdout] == []
