"""What the figures are measured against and on: copy bandwidth, peak extra memory, machine and commit."""

import ctypes
import gc
import platform
import subprocess
import time
from pathlib import Path

import torch


def seconds(run, device="cpu", repeats=20):
    """Median wall time of `run()` after three warm-up calls."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def copy_of(nbytes, device="cpu"):
    """A call that moves nbytes: it reads one buffer of nbytes / 2 and writes another."""
    source = torch.zeros(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(nbytes, device="cpu"):
    """Bytes per second of a copy that moves nbytes, its buffers in the caches as far as they fit."""
    return nbytes / seconds(copy_of(nbytes, device), device)


def peak_extra_bytes(run, device="cpu"):
    """How far memory rose above its level before `run()`, at its highest during it. None if unknown."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def describe(device="cpu"):
    """Machine, versions and commit, for every results file."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "kernels", "benchmarks"], capture_output=True, text=True
        ).stdout
        commit = commit.strip() + ("+changes" if dirty.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    processor = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    gpu = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else None
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
