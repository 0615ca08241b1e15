"""What this machine has, what training will use of it, what is missing and how to get it.

Only the standard library and rich are imported at the top: the doctor must be able to say that torch is
missing. Packages that load native code are imported, since that is how they break; of the others the version
is read.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crd_fast.worlds import FILES, WORLDS

MINIMUM_PYTHON = (3, 11)
COMPILERS = ("c++", "g++", "clang++")
GIB = 2**30
MARKS = {"ok": "[green]ok[/green]", "warning": "[yellow]warning[/yellow]", "missing": "[red]missing[/red]"}


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    status: "missing" where training cannot run without it, "warning" where it can, slower or with less.
    """

    name: str
    status: Literal["ok", "missing", "warning"]
    found: str
    note: str = ""


def checks() -> list[Check]:
    """Everything training depends on, in the order of the table."""
    return [
        _python(),
        _system(),
        _processor(),
        _memory(),
        _torch(),
        *_gpus(),
        _triton(),
        _compiler(),
        *(_package(name) for name in ("diffusers", "transformers", "peft")),
        _bitsandbytes(),
        _flash_attention(),
        *(_builtin(world.name, world.folder) for world in WORLDS.values()),
        _kernels_library(),
        _write_access(),
        _disk(),
    ]


def choices() -> dict[str, str]:
    """What training will use here, by what it is used for. Needs torch."""
    import torch
    from crd_kernels import dispatch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    loss = dispatch.choose("auto", device)
    if loss == "cpu":
        loss += " (compiled C++)" if _found_compiler() else " (tiles of torch operations: no C++ compiler)"
    eight_bit = attempt("bitsandbytes")[0] is not None
    return {
        "device": f"GPU 0, {torch.cuda.get_device_name(0)}"
        if gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "loss": loss,
        "optimizer": "adamw or adamw8bit, as the recipe says"
        if eight_bit
        else "adamw; adamw8bit needs bitsandbytes",
        "attention": "torch scaled_dot_product_attention",
    }


def render(console: Console) -> int:
    """Prints a table of `checks` and what will be used. Returns 0 if training can run here, else 2."""
    with console.status("looking at this machine"):
        found = checks()
        missing = [check.name for check in found if check.status == "missing"]
        used = {} if missing else choices()
    table = Table(title="crd-fast doctor", title_justify="left", title_style="bold")
    for column in ("", "what", "found", "note"):
        table.add_column(column, overflow="fold")
    for check in found:
        table.add_row(MARKS[check.status], escape(check.name), escape(check.found), escape(check.note))
    console.print(table)
    if missing:
        console.print(
            f"Training cannot run here yet. Missing: {escape(', '.join(missing))}.", highlight=False
        )
        return 2
    console.print("Training can run here, and will use:", highlight=False)
    for purpose, choice in used.items():
        console.print(f"  {purpose:<10}{escape(choice)}", highlight=False)
    return 0


# --- helpers


def attempt(module: str) -> tuple[ModuleType | None, str]:
    """Imports `module` quietly. Returns it and "", or None and the reason in one line."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(module), ""
    except Exception as error:  # a broken package may raise anything
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]


def required(package: str) -> str:
    """The requirement crd-fast states for a package, such as `peft>=0.18`."""
    try:
        stated = metadata.requires("crd-fast") or []
    except metadata.PackageNotFoundError:
        stated = []
    names = {re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0].lower(): line for line in stated}
    return names.get(package.lower(), package).partition(";")[0].replace(" ", "")


def pip_install(*arguments: str) -> str:
    """The command that installs into this very interpreter, as short as it can be said from here."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "pip", "install", *arguments])


def install_compiler() -> str:
    """The command that gives this system a C++ compiler."""
    managers = {
        "apt-get": "g++",
        "dnf": "gcc-c++",
        "zypper": "gcc-c++",
        "pacman": "gcc",
        "apk": "g++ musl-dev",
    }
    if sys.platform == "darwin":
        return "xcode-select --install"
    manager = next((name for name in managers if shutil.which(name)), "apt-get")
    verb = {"pacman": "-S", "apk": "add"}.get(manager, "install")
    return f"sudo {manager} {verb} {managers[manager]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _older(package: str, version: str) -> bool:
    minimum = required(package).partition(">=")[2].partition(",")[0]
    return bool(minimum) and _numbers(version) < _numbers(minimum)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# --- the machine


def _python() -> Check:
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    if sys.version_info < MINIMUM_PYTHON:
        return Check(
            "python", "missing", platform.python_version(), f"make env PYTHON=python{wanted}, or newer"
        )
    return Check("python", "ok", platform.python_version())


def _system() -> Check:
    if sys.platform == "win32":
        return Check("system", "warning", platform.platform(), "tried on Linux only: wsl --install")
    return Check("system", "ok", platform.platform(terse=True))


def _processor() -> Check:
    model = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    name = model.group(1) if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("CPU", "ok", f"{name}, {cores} cores")


def _memory() -> Check:
    """Of the machine, or of the container where that has less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Check("memory", "warning", "unknown")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    total = min(total, int(limit)) if limit.isdigit() else total
    free = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    free = min(total, int(free.group(1)) * 1024) if free else total
    short = free < 4 * GIB
    note = "little is free: set train.micro_batch=1 and rollout.micro_batch=1" if short else ""
    return Check("memory", "warning" if short else "ok", f"{_gib(total)}, {_gib(free)} free", note)


def _torch() -> Check:
    torch, reason = attempt("torch")
    if torch is None:
        return Check(
            "torch", "missing", _version("torch") or "not installed", f"{pip_install('torch')} ({reason})"
        )
    if _older("torch", torch.__version__):
        return Check("torch", "missing", torch.__version__, pip_install("-U", required("torch")))
    return Check("torch", "ok", torch.__version__)


def _gpus() -> list[Check]:
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


def _gpu(torch: ModuleType, index: int) -> Check:
    try:
        properties = torch.cuda.get_device_properties(index)
    except RuntimeError as error:
        return Check(f"GPU {index}", "warning", "does not answer", " ".join(str(error).split())[:200])
    if torch.version.hip:
        kind = f"ROCm {torch.version.hip}, {properties.gcnArchName}"
    else:
        kind = f"CUDA {torch.version.cuda}, compute capability {properties.major}.{properties.minor}"
    return Check(f"GPU {index}", "ok", f"{properties.name}, {_gib(properties.total_memory)}, {kind}")


# --- packages


def _has_gpu() -> bool:
    torch, _ = attempt("torch")
    return torch is not None and torch.cuda.is_available()


def _triton() -> Check:
    triton, reason = attempt("triton")
    if triton is not None:
        return Check(
            "triton", "ok", triton.__version__, "" if _has_gpu() else "for GPUs; not used on the CPU"
        )
    if not _has_gpu():
        return Check("triton", "ok", _version("triton") or "not installed", "only of use with a GPU")
    note = f"without it the loss on the GPU is slower: {pip_install(required('triton'))} ({reason})"
    return Check("triton", "warning", _version("triton") or "not installed", note)


def _found_compiler() -> str | None:
    """The one crd_kernels builds with: $CXX, or the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def _compiler() -> Check:
    path = _found_compiler()
    if path:
        return Check("C++ compiler", "ok", path)
    note = f"without it the loss on the CPU is slower: {install_compiler()}"
    return Check("C++ compiler", "warning", f"none of $CXX, {', '.join(COMPILERS)}", note)


def _package(name: str) -> Check:
    version = _version(name)
    if version is None or importlib.util.find_spec(name) is None:
        return Check(name, "missing", "not installed", pip_install(required(name)))
    if _older(name, version):
        return Check(name, "missing", version, pip_install("-U", required(name)))
    return Check(name, "ok", version)


def _bitsandbytes() -> Check:
    module, reason = attempt("bitsandbytes")
    if module is not None:
        return Check("bitsandbytes", "ok", _version("bitsandbytes") or "unknown version")
    found = f"{_version('bitsandbytes')}, broken" if _version("bitsandbytes") else "not installed"
    install = pip_install("--force-reinstall", "--no-deps", required("bitsandbytes"))
    return Check("bitsandbytes", "warning", found, f"for adamw8bit, int8 and nf4: {install} ({reason})")


def _flash_attention() -> Check:
    version = _version("flash-attn")
    if version is None:
        note = pip_install("--no-build-isolation", "flash-attn") if _has_gpu() else "only of use with a GPU"
        return Check("flash-attn", "ok", "not installed", f"optional: {note}")
    module, reason = attempt("flash_attn")
    if module is None:
        note = (
            f"optional: {pip_install('--force-reinstall', '--no-deps', '--no-build-isolation', 'flash-attn')}"
        )
        return Check("flash-attn", "warning", f"{version}, broken", f"{note} ({reason})")
    return Check("flash-attn", "ok", version, "optional")


# --- files


def _builtin(name: str, folder: Path) -> Check:
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


def _kernels_library() -> Check:
    """Hugging Face's `kernels`, which diffusers, transformers and bitsandbytes import if it is installed."""
    name, version = "library `kernels`", _version("kernels")
    try:
        spec = importlib.util.find_spec("kernels")
    except (ImportError, ValueError):
        spec = None
    origin = spec.origin if spec else None  # None also for a folder without __init__.py, which hides nothing
    if version is None and origin is None:
        return Check(name, "ok", "not installed", "optional")
    expected = metadata.distribution("kernels").locate_file("kernels/__init__.py") if version else None
    if origin and expected and Path(origin).resolve() == Path(str(expected)).resolve():
        return Check(name, "ok", version or "")
    hiding = origin or "a folder without __init__.py"
    return Check(name, "warning", f"hidden by {hiding}", "rename that folder, or run from another one")


def _write_access() -> Check:
    try:
        with tempfile.TemporaryFile(dir="."):
            return Check("current folder", "ok", "can be written to")
    except OSError as error:
        reason = f"cannot be written to: {error.strerror}"
        return Check("current folder", "missing", reason, "cd ~, or name another folder with --output")


def _disk() -> Check:
    try:
        free = shutil.disk_usage(".").free
    except OSError as error:
        return Check("disk", "warning", f"unknown: {error.strerror}")
    if free < GIB / 4:
        return Check(
            "disk", "missing", f"{_gib(free)} free", "free some space, or name another disk with --output"
        )
    note = "" if free > 5 * GIB else "checkpoints of large models need more"
    return Check("disk", "ok" if not note else "warning", f"{_gib(free)} free", note)
