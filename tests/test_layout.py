"""The rooms of crd_fast import one another in one direction, from what computes to what a user calls."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "crd_fast"
# A room may import those in earlier rows, whether at the top, in a function or for types alone.
ROWS = (
    ("errors",),
    ("seeds", "worlds"),
    ("config",),
    ("ranks", "prompts"),
    ("models", "rewards"),
    ("weights", "run"),
    ("train",),
    ("plan", "doctor"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
ROW = {room: number for number, row in enumerate(ROWS) for room in row}


def imported(source):
    """The modules that Python source imports, dotted; each name of a `from` as well, which may be one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(source):
    return {name.split(".")[1] for name in imported(source) if name.startswith("crd_fast.")} & set(ROW)


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_its_row():
    assert {room_of(path) for path in modules()} == set(ROW)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room, source = room_of(path), path.read_text(encoding="utf-8")
    later = {other for other in rooms(source) - {room} if ROW[other] >= ROW[room]}
    assert not later, f"{room} imports {later}"
    outside = {name.split(".")[0] for name in imported(source)} & {"tests", "benchmarks", "tools"}
    assert not outside, f"the package imports {outside}"


def test_all_kinds_of_imports_are_seen():
    source = (
        "import crd_fast.cli\nfrom crd_fast import ranks\nfrom crd_fast.plan.fit import fit\n"
        "def later():\n    from crd_fast.train import trainer\n"
    )
    assert rooms(source) == {"cli", "ranks", "plan", "train"}
