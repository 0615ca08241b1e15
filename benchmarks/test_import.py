"""Seconds that importing crd_kernels takes beyond torch's own import; the aim is under 0.2."""

import subprocess
import sys

CODE = "import time, torch; t = time.perf_counter(); import crd_kernels; print(time.perf_counter() - t)"


def test_import(benchmark):
    def once():
        run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        seconds.append(float(run.stdout))

    seconds = []
    benchmark.pedantic(once, rounds=3)
    benchmark.extra_info |= {"op": "import", "seconds_beyond_torch": min(seconds)}
