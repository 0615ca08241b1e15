"""Rewards that are not this package's: how their code is found, and which address is of this machine."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import ipaddress
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from crd_fast.errors import MissingPackage, UserError, did_you_mean
from crd_fast.rewards.failures import failure


def is_address(name: str) -> bool:
    """Whether a reward's name is the address of the server that it asks."""
    return name.startswith(("http://", "https://"))


def host_of(address: str) -> str:
    """The name or number of `SCHEME://HOST:PORT/...`, or of `//HOST:PORT`; "" where there is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def imported(name: str, path: str) -> Callable:
    """The function or class that `path`, `package.module:name` or `file.py:name`, means.

    Raises UserError where there is none, where importing it raises anything, MissingPackage where that is for
    another module's sake, and for what is no reward: other objects that can be called, and Python's own
    functions and classes (`os:system`, `subprocess:Popen`).
    """
    module, _, attribute = path.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a reward of one's own lies where the command is run
    if module.endswith(".py"):
        module = _module_of_file(name, Path(module))
    _refuse_pythons_own(name, module)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except SyntaxError as error:
        where = f"{error.filename} line {error.lineno}"
        raise UserError(f"rewards: {name!r} cannot be imported: {where}: {error.msg}") from error
    except (ImportError, AttributeError) as error:
        hint = did_you_mean(attribute, _own_functions(sys.modules.get(module)))
        others = isinstance(error, ImportError) and not f"{module}.".startswith(f"{error.name}.")
        kind = MissingPackage if others else UserError
        raise kind(f"rewards: {name!r} cannot be imported: {error}{hint}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{failure(name, error)}, while it was imported") from error
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        raise UserError(f"rewards: {name!r}: expected a function or a class, got {type(found).__name__}")
    _refuse_pythons_own(name, found.__module__)
    if inspect.isclass(found) and not (hasattr(found, "score") or "__call__" in dir(found)):
        raise UserError(f"rewards: {name!r}: expected a method score(images, prompts, metadata), found none")
    if inspect.isfunction(found):
        check_arguments(name, found, {})
    return found


def check_arguments(name: str, function: Callable, settings: Mapping) -> None:
    """Raises UserError where a function cannot be called as a reward with these settings."""
    parameters = inspect.signature(function).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 3 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        got = ", ".join(p.name for p in parameters)
        raise UserError(f"reward {name}: expected arguments images, prompts, metadata, got ({got})")
    if settings:
        try:
            inspect.signature(function).bind(None, None, None, **settings)
        except TypeError as error:
            raise UserError(f"reward {name}: {error}") from None


def _own_functions(module: Any) -> list[str]:
    """The names of functions and classes that a module defines; none where it was not imported."""
    return [
        name
        for name, value in (vars(module) if module else {}).items()
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__
    ]


def _refuse_pythons_own(name: str, module: str | None) -> None:
    if (module or "").partition(".")[0] in sys.stdlib_module_names:
        raise UserError(
            f"rewards: {name!r}: {module} is Python's own and has no rewards; expected a function or a class "
            "of a module of yours"
        )


def _module_of_file(name: str, path: Path) -> str:
    """The module that a file is, which can then be imported, in workers too."""
    if not path.is_file():
        raise UserError(f"rewards: {name!r}: no file {path} here")
    if "." in path.stem:  # a module of a package, to Python
        raise UserError(f"rewards: {name!r}: expected a file without a dot before .py; rename {path.name}")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    found = importlib.util.find_spec(path.stem)
    if found is None or found.origin is None or Path(found.origin).resolve() != path.resolve():
        other = f" ({found.origin})" if found and found.origin else ""
        raise UserError(
            f"rewards: {name!r}: another module is called {path.stem} already{other}; rename the file"
        )
    return path.stem
