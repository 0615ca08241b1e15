"""Everything that needs a GPU, in at most ten minutes on one card, as one result page.

    python -m tools.gpu_check [--out DIR]        (make gpu)

Runs the headline benchmarks, the tests marked gpu, a short training run, the memory plan against what is
allocated (tools/memory_check.py), and the benchmarks of other shapes; each step has its share of the time and
is stopped at its end. Writes DIR/page.md (machine, commit, every step's verdict and last lines) after each
step, and keeps the steps' own files beside it: of a step that was stopped, what it had measured. Exit status
1 if a step failed; a step that this checkout cannot run is listed as skipped.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BUDGET = 600  # seconds
TAIL = 25  # lines of a step's output on the page


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple  # what runs, from the repository's root
    seconds: int  # its limit
    needs: str = ""  # path that must exist, else the step is skipped
    tail: int = TAIL


@dataclass(frozen=True)
class Verdict:
    step: Step
    outcome: str  # passed | failed | timed out | skipped
    seconds: float
    output: str


def steps(out):
    """The steps of a real run, in order; their limits add up to the budget."""
    python = (sys.executable, "-m")
    headline, others = f"{out}/headline.jsonl", f"{out}/other_shapes.jsonl"
    return [
        Step(
            "headline",
            (*python, "benchmarks.compare_gpu", "--headline", "--out", headline),
            150,
            needs="benchmarks/compare_gpu.py",
        ),
        Step("tests", (*python, "pytest", "tests", "-m", "gpu", "-q"), 130),
        Step(
            "training",
            (*python, "crd_fast", "train", "--max-iterations", "3", "--output", f"{out}/run"),
            115,
            needs="crd_fast/cli",
        ),
        Step(
            "memory plan",
            (*python, "tools.memory_check", "--json", f"{out}/memory.json"),
            90,
            needs="tools/memory_check.py",
        ),
        Step(  # as many as there is time for: the last one begun may take the rest
            "other shapes",
            (*python, "benchmarks.compare_gpu", "--without-headline", "--seconds", "60", "--out", others),
            105,
            needs="benchmarks/compare_gpu.py",
        ),
        Step(
            "figures",
            (*python, "benchmarks.crd_results", headline, others),
            10,
            needs="benchmarks/crd_results.py",
            tail=150,
        ),
    ]


def run_step(step, left):
    """Runs one step within its limit and the time left."""
    if step.needs and not any(ROOT.glob(f"{step.needs}*")):
        return Verdict(step, "skipped", 0.0, f"{step.needs} is not there")
    limit, start = min(step.seconds, left), time.monotonic()
    if limit <= 0:
        return Verdict(step, "skipped", 0.0, "no time left")
    try:
        run = subprocess.run(step.command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        outcome, output = "passed" if run.returncode == 0 else "failed", run.stdout + run.stderr
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout or b""
        outcome, output = "timed out", text.decode(errors="replace") if isinstance(text, bytes) else text
    return Verdict(step, outcome, time.monotonic() - start, output)


def machine():
    """Lines that say where the figures come from."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import crd_machine

    about = crd_machine.describe("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
    return [f"- {name}: {value}" for name, value in about.items() if value]


def page(verdicts):
    lines = ["# One card, one run", "", *machine(), "", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {v.step.name} | {v.outcome} | {v.seconds:.0f} |" for v in verdicts]
    for v in verdicts:
        tail = v.output.strip().splitlines()[-v.step.tail :]
        lines += ["", f"## {v.step.name}", "", f"`{' '.join(v.step.command[1:])}`", "", "```", *tail, "```"]
    return "\n".join(lines) + "\n"


def check(planned, out):
    """Runs the steps and writes the page; returns the exit status."""
    start, verdicts = time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    for step in planned:
        verdict = run_step(step, BUDGET - (time.monotonic() - start))
        print(f"{step.name}: {verdict.outcome}, {verdict.seconds:.0f} s", flush=True)
        verdicts.append(verdict)
        (out / "page.md").write_text(page(verdicts))
    print(f"written: {out / 'page.md'}")
    return 1 if any(v.outcome in ("failed", "timed out") for v in verdicts) else 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = (
        ROOT / "outputs" / time.strftime("gpu-%Y%m%d-%H%M%S")
    )  # figures of another run are not taken for its
    parser.add_argument("--out", type=Path, default=own, help="folder of the page, a new one")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: expected a CUDA or ROCm device, found none", file=sys.stderr)
        return 2
    if any(options.out.glob("*.jsonl")) or (options.out / "run").exists():
        print(f"gpu_check: --out {options.out}: has a run already, expected a new folder", file=sys.stderr)
        return 2
    return check(steps(options.out.resolve()), options.out)


if __name__ == "__main__":
    sys.exit(main())
