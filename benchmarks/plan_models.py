"""Plans of published models at full size: `python -m benchmarks.plan_models [NAME ...]`.

512 x 512, groups of 24, LoRA rank 32, guided anchor, checkpointing, 8-bit AdamW, micro-batch 1. Nothing is
loaded or downloaded and no GPU is needed; minutes for each. Writes results/plans.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from crd_fast.config import build_recipe
from crd_fast.plan.fit import RESERVED
from crd_fast.plan.gpus import GIB
from crd_fast.plan.planner import Planner

RESULT = Path(__file__).parent / "results" / "plans.json"
CASES = {  # model, overrides
    "sd3.5-medium": ("sd3.5-medium", ()),
    "sd3.5-medium nf4": ("sd3.5-medium", ("model.quantization=nf4",)),
    "flux.1-dev nf4": ("flux.1-dev", ("model.quantization=nf4",)),
    "qwen-image nf4": ("qwen-image", ("model.quantization=nf4",)),
    "sd3.5-medium full": ("sd3.5-medium", ("model.method=full",)),
    "sd3.5-medium full bf16": (
        "sd3.5-medium",
        ("model.method=full", "model.dtype=bf16", "model.snapshots=host"),
    ),
    "z-image nf4": ("z-image", ("model.quantization=nf4",)),
    "flux.2-klein-4b": ("flux.2-klein-4b", ()),
    "flux.2-klein-4b nf4": ("flux.2-klein-4b", ("model.quantization=nf4",)),
    "sd3.5-large nf4": ("sd3.5-large", ("model.quantization=nf4",)),
    "sana-1.6b": ("sana-1.6b", ()),
    "flux.1-dev": ("flux.1-dev", ()),
    "flux.1-dev int8": ("flux.1-dev", ("model.quantization=int8",)),
    "z-image": ("z-image", ()),
    "qwen-image": ("qwen-image", ()),
    "sd3.5-large": ("sd3.5-large", ()),
    "qwen-image nf4 streamed": ("qwen-image", ("model.quantization=nf4", "model.streaming=true")),
    "flux.1-dev streamed": ("flux.1-dev", ("model.streaming=true",)),
    "sd3.5-large streamed": ("sd3.5-large", ("model.streaming=true",)),
}


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    results = json.loads(RESULT.read_text())["plans"] if RESULT.exists() else {}
    for name in sys.argv[1:] or CASES:
        path, overrides = CASES[name]
        started = time.perf_counter()
        plan = Planner(build_recipe({"model": {"path": path}}, overrides)).plan(1, 1)
        results[name] = {"model": path, "overrides": list(overrides), **plan.to_json()}
        training = {phase: peak.bytes for phase, peak in plan.phases.items() if phase != "encode"}
        worst = max(training, key=training.get)
        print(
            f"{name}: {training[worst] / GIB:.2f} GB in {worst}, "
            f"encoders {plan.phases['encode'].bytes / GIB:.2f} GB, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
        document = {"commit": commit.stdout.strip(), "reserved_bytes": RESERVED, "plans": results}
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
