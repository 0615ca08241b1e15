"""What `crd-fast plan` predicts beside what a run allocates: `python -m tools.memory_check [--json FILE]`.

Each case is planned, then run for two iterations, rollout and update each with its own peak: on a GPU by
torch.cuda.max_memory_allocated, on the CPU by counting live tensors. Exit status 1 where the two differ by
more than `--tolerance`: a plan that is wrong on this card should be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure_iteration import pipeline
from crd_fast.config import Recipe, build_recipe
from crd_fast.plan.cuda_autocast import cuda_autocast
from crd_fast.plan.live_bytes import LiveBytes, tensors_of
from crd_fast.plan.planner import Planner
from crd_fast.run.observer import Observer
from crd_fast.train.trainer import Trainer

PHASES = ("rollout", "update")
PROMPT = "a red circle left of a blue square"
CASES = {
    "bf16": ("train.micro_batch=8", "rollout.micro_batch=8"),
    "bf16, micro-batch 2": ("train.micro_batch=2", "rollout.micro_batch=2"),
    "bf16, micro-batch 2, no checkpointing": ("train.micro_batch=2", "train.checkpointing=false"),
    "NF4": ("train.micro_batch=8", "rollout.micro_batch=8", "model.quantization=nf4"),
}
# of the transformer, a Stable Diffusion 3 of random weights: 0.3 billion parameters where there is a GPU, so
# that what the allocator rounds is small beside them
ON_GPU = {"layers": 8, "heads": 16, "head_width": 64}
ON_CPU = {"layers": 2, "heads": 4, "head_width": 32}


class CudaMeter:
    """Peaks by CUDA's allocator, above what was there before the model."""

    size = ON_GPU

    def __init__(self):
        for dtype in (torch.float32, torch.bfloat16):  # cuBLAS takes its workspace at the first product
            x = torch.ones(64, 64, dtype=dtype, device="cuda")
            torch.nn.functional.linear(x, x, x[0])
        del x
        self.before = torch.cuda.memory_allocated()

    def context(self):
        return contextlib.nullcontext()

    def known(self, tensors) -> None:
        """They were allocated on the card: nothing to do."""

    @contextlib.contextmanager
    def phase(self, name: str, peaks: dict[str, int]):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - self.before


class LiveMeter:
    """Peaks by counting tensors, in a run under the rules of CUDA's autocast: the same without a GPU."""

    size = ON_CPU

    def __init__(self):
        self.live = LiveBytes()

    @contextlib.contextmanager
    def context(self):
        with cuda_autocast(), self.live:
            yield

    def known(self, tensors) -> None:
        self.live.add(tensors)

    @contextlib.contextmanager
    def phase(self, name: str, peaks: dict[str, int]):
        with self.live.in_phase(name):
            yield
        peaks[name] = self.live.peaks.pop(name).bytes


class Peaks(Observer):
    """Bytes of the phases, each by the meter's own peak."""

    def __init__(self, meter):
        self.meter = meter
        self.bytes: dict[str, int] = {}

    def phase(self, name: str, total: int | None = None):
        return self.meter.phase(name, self.bytes) if name in PHASES else super().phase(name, total)


def measured(recipe, meter, folder: Path) -> dict[str, int]:
    """Peak bytes of the second iteration's rollout and update: the first makes the optimizer's state."""
    peaks = Peaks(meter)
    with meter.context():
        run = Trainer(recipe, folder, observer=peaks)
    meter.known(tensors_of(run.model.transformer))
    with meter.context():
        for _ in range(2):
            run.iterate()
    return peaks.bytes


def planned(recipe) -> dict[str, int]:
    plan = Planner(recipe).plan()
    phases = {name: peak.bytes for name, peak in plan.phases.items()}
    rollout = max(phases["rollout"], phases.get("decode", 0))  # a rollout decodes what is finished
    return {"rollout": rollout, "update": max(phases["measure"], phases["update"], phases["step"])}


def recipes(folder: Path, size: dict[str, int]) -> Iterator[tuple[str, Recipe]]:
    """The cases by name, on one pipeline."""
    pipeline(folder / "sd3", **size)
    (folder / "prompts.txt").write_text(f"{PROMPT}\n" * 4, encoding="utf-8")
    prompts = {"prompts": str(folder / "prompts.txt")}
    values = {
        "model": {"path": str(folder / "sd3"), "text_length": 24, "prompt_cache": str(folder / "cache")},
        "rollout": {
            **prompts,
            "prompts_per_iteration": 2,
            "samples_per_prompt": 8,
            "steps": 4,
            "resolution": 64,
        },
        "rewards": {"jpeg_compressibility": 1.0},
        "train": {"optimizer": "adamw", "timesteps": 1, "steps_per_iteration": 1},
        "evaluate": {"every": 0, **prompts},
    }
    for name, overrides in CASES.items():
        yield name, build_recipe(values, overrides)


def compare(meter_class) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, recipe) in enumerate(recipes(Path(folder), meter_class.size)):
            gc.collect()  # the trainer of the case before
            wanted = planned(recipe)
            got = measured(recipe, meter_class(), Path(folder) / f"run-{index}")
            for phase in PHASES:
                row = {"case": name, "phase": phase, "planned": wanted[phase], "measured": got[phase]}
                rows.append(row | {"ratio": wanted[phase] / got[phase]})
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| case | phase | planned MB | measured MB | planned / measured |", "|---|---|---|---|---|"]
    for row in rows:
        megabytes = [f"{row[key] / 2**20:.2f}" for key in ("planned", "measured")]
        lines.append(f"| {row['case']} | {row['phase']} | {' | '.join(megabytes)} | {row['ratio']:.3f} |")
    return "\n".join(lines)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15)
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    rows = compare(CudaMeter if cuda else LiveMeter)
    print(f"measured by {'torch.cuda.max_memory_allocated' if cuda else 'live tensors on the CPU'}\n")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if any(abs(row["ratio"] - 1) > options.tolerance for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
