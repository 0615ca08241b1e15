"""A provider whose result is wrong gets no figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import pytest
sys.path.insert(0, "benchmarks")
import crd_providers
right = crd_providers.eager
crd_providers.PROVIDERS["eager"] = lambda **tensors: 1.05 * right(**tensors)
chosen = "(eager-forward or ours-forward) and SD3 and 512 and K8"
options = ["-q", "-p", "no:cacheprovider", "--benchmark-json", sys.argv[1]]
sys.exit(pytest.main(["benchmarks/test_crd_loss.py", "-k", chosen, *options]))
"""


@pytest.mark.slow
def test_wrong_provider_fails_and_is_not_reported(tmp_path):
    result = tmp_path / "result.json"
    # nor is this a worker of the outer run, where benchmarks are off
    hidden = ("TRITON_INTERPRET", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(result)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout[-3000:] + run.stderr[-3000:]
    assert "eager: wrong result, no speed reported" in run.stdout
    reported = [bench["extra_info"]["provider"] for bench in json.loads(result.read_text())["benchmarks"]]
    assert reported == ["ours"]
