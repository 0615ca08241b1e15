"""YAML as recipes are written in it: safe, and without what says one thing and means another."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from crd_fast.errors import UserError, unreadable

SUFFIXES = (".yaml", ".yml")


class Loader(yaml.SafeLoader):
    """Safe YAML that also takes 3e-4 for a number, as people write it.

    Refused: a key that stands twice in one mapping, of which the last would win, and whole numbers in YAML's
    other notations: 017, which is 15, and 1:30, which is 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused by the class above
            line = key_node.start_mark.line + 1
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key!r} stands twice, first in line {lines[key]}",
                    problem_mark=key_node.start_mark,
                )
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if re.fullmatch(r"[-+]?0[0-7_]+|.*:.*", text):
            value = super().construct_yaml_int(node)
            raise yaml.constructor.ConstructorError(
                problem=f"{text} means {value} in YAML: write a number without zeros before it or colons",
                problem_mark=node.start_mark,
            )
        return super().construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Dumper(yaml.SafeDumper):
    """Puts in quotation marks what `Loader` would take for a number."""


for reads_or_writes in (Loader, Dumper):
    reads_or_writes.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def dump_yaml(values: Any, **style: Any) -> str:
    """Text of which `parse_yaml` makes the same values, keys in their order. style: of PyYAML's `dump`."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, **style)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError, `where` before it, that names line and reason."""
    try:
        return yaml.load(text, Loader)
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{where}:{_line(error, text)} {error.problem}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}:{_line(error, text)} is not YAML: {reason}") from None
    except RecursionError:
        raise UserError(f"{where}: is not YAML: brackets without an end") from None
    except Exception as error:  # of its constructors: of a date that is none, a tag on another value
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: is not YAML: {reason}") from None


def _line(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}:" if mark and "\n" in text.strip() else ""


def is_yaml(path: Path) -> bool:
    """By its name."""
    return path.suffix in SUFFIXES


def read_yaml(path: Path) -> dict:
    """A YAML file that holds a mapping, without a schema's checks."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise UserError(unreadable(path, error, SUFFIXES)) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected UTF-8 text") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections with keys, got {type(values).__name__}")
    return values
