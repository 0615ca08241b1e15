"""The notebook's cells run as they stand, with fewer iterations."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "builtin_ocr.ipynb"
FEWER = """
ITERATIONS = 1
SETTINGS = ["rollout.prompts_per_iteration=2", "evaluate.max_prompts=4", "evaluate.guided_base=false"]
OUTPUT = "run"
"""


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    cells = [
        cell
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert cells[0]["metadata"]["tags"] == ["parameters"]
    names: dict = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        exec(compile(source, f"cell {number}", "exec"), names)
        if number == 0:
            assert set(names) > {"ITERATIONS", "SETTINGS", "OUTPUT"}
            exec(FEWER, names)
    assert len(names["trained"]) == 1 and len(names["evaluations"]) == 2
    assert all((tmp_path / f"{name}.png").is_file() for name in ("before", "after"))
    plt.close("all")
