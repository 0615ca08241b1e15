"""docs/reliability.md names tests that there are."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
TEST = r"`([\w/]+\.py)::(\w+)`"


def rows():
    """The cells of every row: fault, how it is made, what happens, test."""
    faults = PAGE.read_text(encoding="utf-8").partition("\n## Counts\n")[0]
    lines = [line for line in faults.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "Fault" and not row[0].startswith("---")]


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_row_names_tests_that_there_are(row):
    assert len(row) == 4 and all(row)
    assert re.fullmatch(rf"{TEST}(, {TEST})*", row[3]), row[3]
    for file, name in re.findall(TEST, row[3]):
        assert (TESTS / file).is_file(), file
        assert name.startswith("test_") and name in functions(TESTS / file), f"{file} has no {name}"


def test_there_are_rows_and_each_fault_stands_once():
    faults = [row[0] for row in rows()]
    assert len(faults) > 30 and len(set(faults)) == len(faults)
