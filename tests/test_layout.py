"""The rooms of crd_fast import one another in one direction, from what computes to what a user calls."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "crd_fast"
# A room may import those in earlier rows, whether at the top, in a function or for types alone.
ROWS = (
    (
        "errors",
        "file_modes",
        "hints",
        "launched",
        "once",
        "out_of_memory",
        "quick_imports",
        "sections",
        "sizes",
    ),
    ("reward_weights", "schema", "seeds", "worlds", "yaml_files"),
    ("config",),
    ("ranks", "prompts"),
    ("models", "rewards"),
    ("weights", "run"),
    ("train",),
    ("plan", "doctor"),
    ("study",),
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


# Of torch, where there is no public name; and of what `Tuple._replace` and the like are in Python itself.
FOREIGN = {
    *("_fields", "_replace", "_foreach_lerp_", "_inductor", "_dynamo", "_cdata", "_overloadpacket"),
    *("_sleep", "_current_graph_task_id", "_scoped_library", "_dispatch_has_kernel_for_dispatch_key"),
    *("_parameters", "_buffers", "_local_scalar_dense", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_flash_attention_for_cpu_backward", "_is_param"),
}
WATCHERS = sorted(
    path
    for folder in (PACKAGE / "plan", PACKAGE.parent / "tools", PACKAGE.parent / "benchmarks")
    for path in folder.rglob("*.py")
)


def private_names(source):
    """Attributes of others that begin with one underscore."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own:
                yield node.attr


@pytest.mark.parametrize("path", WATCHERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_watches_a_run_is_told_and_touches_nothing_private(path):
    assert not set(private_names(path.read_text(encoding="utf-8"))) - FOREIGN


def test_private_names_are_seen():
    assert list(private_names("run._rollout = f(run)\nself._mine = self.other._theirs")) == [
        "_rollout",
        "_theirs",
    ]
