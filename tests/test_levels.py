"""tools/test_as.py: at a level, everything that computes is at it."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tools.test_as import LEVELS, environment

PROGRAM = """
import torch
torch.ones(64, 64) @ torch.ones(64, 64)
torch.nn.functional.conv2d(torch.ones(2, 16, 32, 32), torch.ones(16, 16, 3, 3))
print("aten", torch.backends.cpu.get_cpu_capability())
from crd_kernels.native import build
print("native", build.library()._name)
"""
MKL = {"avx512": "AVX-512", "avx2": "AVX2", "sse4": "SSE4.2"}
ONEDNN = {"avx512": "AVX-512", "avx2": "AVX2", "sse4": "SSE4.1"}
ATEN = {"avx512": "AVX512", "avx2": "AVX2", "sse4": "DEFAULT"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
@pytest.mark.parametrize("level", LEVELS)
def test_everything_computes_at_the_level(tmp_path, level):
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") and level == "avx512":
        pytest.skip("needs AVX-512")
    env = os.environ | environment(level, tmp_path) | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    mkl = re.search(r"MKL_VERBOSE oneMKL .*", found.stdout)[0]
    assert f"{MKL[level]}) enabled processors" in mkl
    assert f"aten {ATEN[level]}\n" in found.stdout
    onednn = re.search("onednn_verbose.*cpu,isa:(.*)", found.stdout)[1]
    assert ONEDNN[level] in onednn
    library = re.search("native (.*)", found.stdout)[1]
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True).stdout
    assert ("%zmm" in code, "%ymm" in code) == (level == "avx512", level != "sse4")
