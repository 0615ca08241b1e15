"""Shared by the kernel tests: the oracle beside them, and which implementations can run here.

Every test that takes `impl` runs for each of them. "triton" needs a GPU (the test's tensors are then made
there) or Triton's interpreter, which must be chosen before triton is imported: test_interpreter.py starts
pytest anew for that.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_oracle import INTERPRETING

GPU = torch.cuda.is_available()
IMPLEMENTATIONS = ["reference", "cpu"]
if GPU or INTERPRETING:
    IMPLEMENTATIONS.append(pytest.param("triton", marks=pytest.mark.gpu))


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request):
    """Every implementation that runs on this machine."""
    if request.param == "triton" and not INTERPRETING:
        torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """The sizes here are tiny: threads only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """torch.empty comes filled with NaN, and ops without a deterministic implementation are refused."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
