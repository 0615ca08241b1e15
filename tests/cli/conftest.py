"""A recipe small enough to run in seconds, and the command line as a user calls it."""

import json
import os
import subprocess
import sys

import pytest

from crd_fast.run import report as report_module
from crd_fast.run.metrics import MEASURED

SMALL = """
model:     {path: builtin, method: lora, lora_rank: 4, lora_alpha: 4}
rollout:   {prompts_per_iteration: 2, samples_per_prompt: 4, steps: 2, resolution: 32}
loss:      {beta: 10.0, guidance_scale: 4.5}
train:     {iterations: 2, steps_per_iteration: 1, timesteps: 2, checkpointing: false, optimizer: adamw,
            learning_rate: 1.0e-3, precision: fp32}
evaluate:  {every: 2, steps: 2, max_prompts: 6}
checkpoint: {every: 1}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def command(*arguments):
    """`crd-fast` with these arguments, to be run in a process of its own."""
    return [sys.executable, "-m", "crd_fast", *map(str, arguments)]


@pytest.fixture
def no_charts(monkeypatch):
    """Drawing takes most of a report's time; tests of its words do without."""
    monkeypatch.setattr(report_module, "charts", lambda run, judges: {})


@pytest.fixture
def run(inside):
    """`crd-fast` in this process: exit code and standard error."""

    def call(*arguments):
        code, _, err = inside(*arguments)
        return code, err

    return call


def assert_refused(result, *words):
    code, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    for word in words:
        assert word in err


@pytest.fixture
def process():
    """Runs `crd-fast` in a process of its own; returns exit code, standard output and standard error."""

    def run(*arguments):
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def torchrun():
    """Runs `crd-fast` in two processes; returns what subprocess.run does. folder: where they run."""

    def run(*arguments, folder=None):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*launch, "-m", "crd_fast", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            cwd=folder,
        )

    return run


def metrics(run):
    """metrics.jsonl without what depends on the clock and the process."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in records]
