"""Shared by the kernel tests: the oracle beside them, and which implementations can run here."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["reference", "cpu", "tiles"])
def impl(request, monkeypatch):
    """Every implementation that runs on this machine; "tiles" is cpu without a C++ compiler."""
    if request.param == "tiles":
        from crd_kernels.native import build

        monkeypatch.setattr(build, "library", lambda: None)
        return "cpu"
    return request.param


@pytest.fixture(scope="session")
def vectors():
    """Folder of the reference vectors."""
    folder = os.environ.get("CRD_VECTORS")
    if not folder:
        pytest.skip("CRD_VECTORS is not set: the folder with crd_reference.npz and crd_reference.json")
    return Path(folder)


@pytest.fixture(autouse=True)
def one_thread():
    """The sizes here are tiny: threads only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
