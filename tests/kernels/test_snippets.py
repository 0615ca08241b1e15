"""The Python that the documents print about the losses runs as printed, each piece by itself, on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUB = Path(sys.prefix) / "hub"  # Hugging Face's `kernels` (Makefile)

RUN = """
import json, sys
for name, code in json.load(sys.stdin):
    names = {"__name__": "__main__"}
    exec(compile(code, name, "exec"), names)
    if "policy" in names:
        gradient = names["policy"].grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
    print(name)
"""


def snippets(path, section=None):
    """(where, code) of each block of Python, with the line where it stands in the document."""
    text = (ROOT / path).read_text()
    begin, end = 0, len(text)
    if section is not None:
        begin = text.index(f"\n## {section}\n")
        end = text.find("\n## ", begin + 1)
    blocks = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE).finditer(text, begin, end)
    return [(f"{path}:{text.count(chr(10), 0, block.start(1)) + 1}", block.group(1)) for block in blocks]


@pytest.mark.parametrize(
    ("path", "section", "least"),
    [
        ("kernels/README.md", None, 3),
        ("README.md", "The losses in your own trainer", 1),
        ("docs/losses.md", None, 1),
    ],
)
def test_python_runs_as_printed(path, section, least):
    found = snippets(path, section)
    assert len(found) >= least
    if not HUB.exists():
        found = [(where, code) for where, code in found if "from kernels import" not in code]
    ended = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", RUN],
        input=json.dumps(found),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HUB), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [where for where, _ in found]
