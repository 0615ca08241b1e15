"""Checks of the machine: interpreter, system, processor, memory, GPUs, files."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from crd_fast.doctor.check import GIB, Check, attempt, gib, pip_install
from crd_fast.run.machine import cpu_name
from crd_fast.worlds import FILES

MINIMUM_PYTHON = (3, 11)


def python() -> Check:
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    if sys.version_info < MINIMUM_PYTHON:
        return Check(
            "python", "missing", platform.python_version(), f"make env PYTHON=python{wanted}, or newer"
        )
    return Check("python", "ok", platform.python_version())


def system() -> Check:
    if sys.platform == "win32":
        return Check("system", "warning", platform.platform(), "tried on Linux only: wsl --install")
    return Check("system", "ok", platform.platform(terse=True))


def processor() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("CPU", "ok", f"{cpu_name()}, {cores} cores")


def memory() -> Check:
    """The memory of the machine, or of the container if that has less. The file cache counts as free."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Check("memory", "warning", "unknown")
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    free = int(available.group(1)) * 1024 if available else total
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit():
        files = re.search(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        held = int(used or 0) - (int(files.group(1)) if files else 0)
        total, free = min(total, int(limit)), min(free, int(limit) - held)
    short = free < 4 * GIB
    note = "little is free: set train.micro_batch=1 and rollout.micro_batch=1" if short else ""
    return Check("memory", "warning" if short else "ok", f"{gib(total)}, {gib(free)} free", note)


def gpus() -> list[Check]:
    torch, _ = attempt("torch")
    if torch is not None and torch.cuda.is_available():
        return [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        install = pip_install("--force-reinstall", "torch")
        return [Check("GPU", "warning", "an NVIDIA driver, but torch cannot use it", install)]
    if Path("/dev/kfd").exists():
        note = "install the ROCm build of torch: https://pytorch.org/get-started/locally"
        return [Check("GPU", "warning", "an AMD driver, but torch cannot use it", note)]
    return [Check("GPU", "ok", "none", "the built-in recipe trains on the CPU")]


def driver() -> list[Check]:
    """The GPU driver's version, where there is one."""
    smi, amd = shutil.which("nvidia-smi"), _read("/sys/module/amdgpu/version").strip()
    if smi:
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [Check("GPU driver", "warning", "nvidia-smi does not answer", str(error)[:200])]
        if said.returncode or not said.stdout.strip():
            reason = " ".join((said.stdout + said.stderr).split())[:200]
            return [Check("GPU driver", "warning", "nvidia-smi fails", reason or "it says nothing")]
        return [Check("GPU driver", "ok", f"NVIDIA {said.stdout.split()[0]}")]
    return [Check("GPU driver", "ok", f"amdgpu {amd}")] if amd else []


def _gpu(torch: ModuleType, index: int) -> Check:
    try:
        properties = torch.cuda.get_device_properties(index)
    except RuntimeError as error:
        return Check(f"GPU {index}", "warning", "does not answer", " ".join(str(error).split())[:200])
    if torch.version.hip:
        kind = f"ROCm {torch.version.hip}, {properties.gcnArchName}"
    else:
        kind = f"CUDA {torch.version.cuda}, compute capability {properties.major}.{properties.minor}"
    return Check(f"GPU {index}", "ok", f"{properties.name}, {gib(properties.total_memory)}, {kind}")


def builtin(name: str, folder: Path) -> Check:
    """The weights that ship with the package: every file there, and the safetensors whole."""
    absent = [file for file in FILES if not (folder / file).is_file()]
    damaged = [file for file in FILES if file not in absent and not _whole(folder / file)]
    if absent or damaged:
        found = ", ".join([f"no {file}" for file in absent] + [f"{file} is damaged" for file in damaged])
        return Check(
            f"model {name}", "missing", found, shlex.join(["git", "checkout", "--", _from_here(folder)])
        )
    size = sum((folder / file).stat().st_size for file in FILES)
    return Check(f"model {name}", "ok", f"{size / 1e6:.1f} MB of weights")


def _whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says; for other files, whether it has content."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return size > 0
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < size else b""
    ends = [int(end) for end in re.findall(rb'"data_offsets":\s*\[\d+,\s*(\d+)\]', header)]
    return bool(ends) and 8 + length + max(ends) == size


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def write_access() -> Check:
    try:
        with tempfile.TemporaryFile(dir="."):
            return Check("current folder", "ok", "can be written to")
    except OSError as error:
        reason = f"cannot be written to: {error.strerror}"
        return Check("current folder", "missing", reason, "cd ~, or name another folder with --output")


def disk() -> Check:
    try:
        free = shutil.disk_usage(".").free
    except OSError as error:
        return Check("disk", "warning", f"unknown: {error.strerror}")
    if free < GIB / 4:
        return Check(
            "disk", "missing", f"{gib(free)} free", "free some space, or name another disk with --output"
        )
    note = "" if free > 5 * GIB else "checkpoints of large models need more"
    return Check("disk", "ok" if not note else "warning", f"{gib(free)} free", note)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
