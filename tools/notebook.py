"""Runs the notebook of the docs and keeps what its cells drew: `python -m tools.notebook`.

Needs the extra `notebook`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "builtin_ocr.ipynb"


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}})
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran is nobody's business
        if "outputs" in cell:  # what is said on the way are paths of this machine
            cell.outputs = [one for one in cell.outputs if one.output_type != "stream"]
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
