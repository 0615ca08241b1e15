"""One thing that the doctor looks at, and what several checks ask of packages."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    status: "missing" where training cannot run without it, "warning" where it can, slower or with less.
    """

    name: str
    status: Literal["ok", "missing", "warning"]
    found: str
    note: str = ""


def attempt(module: str) -> tuple[ModuleType | None, str]:
    """Imports `module` quietly. Returns it and "", or None and the reason in one line."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(module), ""
    except Exception as error:  # a broken package may raise anything
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]


def has_gpu() -> bool:
    torch, _ = attempt("torch")
    return torch is not None and torch.cuda.is_available()


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


def installed(package: str) -> str | None:
    """The version of a package, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def older(package: str, version: str) -> bool:
    """Whether the version is below what crd-fast states for the package."""
    minimum = required(package).partition(">=")[2].partition(",")[0]
    return bool(minimum) and _numbers(version) < _numbers(minimum)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
