"""The tests as another x86 processor rounds: `python -m tools.test_as avx2 [arguments of pytest]`.

A level caps the instructions of MKL, oneDNN, torch and the kernels compiled here. Each has other
algorithms at each level, whose sums round differently: a test that asks for equality to the bit of what no
library promises to round alike passes on one processor and fails on the next.

MKL goes by a level only where it takes the processor for one of Intel's, and has algorithms apart for all
others. So a library of two functions is preloaded that tells it so: on an AMD processor `avx512` is then what
a Xeon computes, but for its matrix unit (AMX).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LEVELS = {  # MKL, oneDNN, torch, the C++ compiler
    "avx512": ("AVX512", "AVX512_CORE_BF16", "avx512", "x86-64-v4"),
    "avx2": ("AVX2", "AVX2", "avx2", "x86-64-v3"),
    "sse4": ("SSE4_2", "SSE41", "default", "x86-64-v2"),
}
INTEL = "int mkl_serv_intel_cpu(void) { return 1; }\nint mkl_serv_intel_cpu_true(void) { return 1; }\n"


def environment(level: str, folder: Path) -> dict[str, str]:
    """What a process needs to compute at this level; `folder` takes what is compiled."""
    mkl, onednn, aten, march = LEVELS[level]
    library, compiler = folder / "intel.so", folder / "c++"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=INTEL, text=True, check=True)
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -march={march}\n')
    compiler.chmod(0o755)
    return {
        "LD_PRELOAD": str(library),
        "CXX": str(compiler),  # the last of two -march counts
        "CRD_KERNELS_CACHE": str(folder),
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "ATEN_CPU_CAPABILITY": aten,
        "OMP_NUM_THREADS": "1",
    }


def main() -> None:
    level, *arguments = sys.argv[1:] or [""]
    if level not in LEVELS:
        sys.exit(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | environment(level, Path(folder))
        sys.exit(subprocess.run([sys.executable, "-m", "pytest", *arguments], env=env).returncode)


if __name__ == "__main__":
    main()
