"""Seconds and memory of one iteration by phase: `python -m benchmarks.measure_iteration`.

The trainer itself on a small Stable Diffusion 3 pipeline of the real classes: 4 layers, 128 wide, 4 prompts
of 8 samples, 10 steps, all of them trained, 128 x 128 pixels, LoRA of rank 8, fp32. The weights are random,
which changes no time. The first iteration counts every live tensor, which takes time of its own, and warms
up; later ones are timed. Phases are those that the trainer tells its observers of; what is inside another
counts there alone. The reward is the size as a JPEG; its share is the time the run waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import diffusers
import torch

from crd_fast.config import build_recipe
from crd_fast.models.pipeline import PipelineModel
from crd_fast.plan.live_bytes import LiveBytes, tensors_of
from crd_fast.run.machine import cpu_name, git_commit, peak_rss_bytes
from crd_fast.run.observer import Observer
from crd_fast.train import trainer
from tools.make_tiny_pipeline import make_tiny_pipeline

RESULT = Path(__file__).parent / "results" / "iteration.json"
PROMPTS = ["a red circle", "two blue squares", "a green cross above a ring", "a white triangle"]
HEADS, HEAD_WIDTH, LAYERS = 4, 32, 4
NAMES = {  # of the trainer's phases here; time in others is that of the phase around them
    "rollout": "rollout",
    "prompts": "read prompts",
    "decode": "decode",
    "rewards": "reward",
    "update": "update, rest",
    "measure": "loss",
    "center": "loss",
    "backward": "policy backward",
    "optimizer": "optimizer",
    "snapshots": "blend",
    "checkpoint": "checkpoint",
}


class Phases(Observer):
    """Seconds of each phase, without those of the phases inside it; its peak of live bytes where counted."""

    def __init__(self, live: LiveBytes | None = None):
        self.start(live)

    def start(self, live: LiveBytes | None = None) -> None:
        """Forgets what was measured so far."""
        self.live, self.seconds, self.calls = live, Counter(), Counter()
        self._inside = [0.0]

    @contextlib.contextmanager
    def of(self, name: str):
        start = time.perf_counter()
        self._inside.append(0.0)
        with self.live.in_phase(name) if self.live else contextlib.nullcontext():
            yield
        spent = time.perf_counter() - start
        self.seconds[name] += spent - self._inside.pop()
        self._inside[-1] += spent
        self.calls[name] += 1

    def phase(self, name: str, total: int | None = None):
        return self.of(NAMES[name]) if name in NAMES else super().phase(name, total)

    def branch(self, name: str, rows: int):
        if name == "sampler":
            return self.of("rollout")
        trained = name == "policy" and torch.is_grad_enabled()
        return self.of("policy forward" if trained else "frozen forwards")


def pipeline(folder: Path, layers: int = LAYERS, heads: int = HEADS, head_width: int = HEAD_WIDTH) -> None:
    """The tiny pipeline with a transformer of a size at which layers, not calls, take the time."""
    make_tiny_pipeline("sd3", folder)
    config = diffusers.SD3Transformer2DModel.load_config(folder, subfolder="transformer")
    wider = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "caption_projection_dim": heads * head_width,
        "pos_embed_max_size": 64,
    }
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel.from_config({**config, **wider})
    network.save_pretrained(folder / "transformer")


def recipe_of(folder: Path):
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return build_recipe(
        {
            "model": {
                "path": str(folder),
                "lora_rank": 8,
                "lora_alpha": 16,
                "text_length": 64,
                "prompt_cache": str(folder.parent / "cache"),
            },
            "rollout": {
                "prompts": str(prompts),
                "prompts_per_iteration": len(PROMPTS),
                "samples_per_prompt": 8,
                "steps": 10,
                "resolution": 128,
                "micro_batch": 8,
            },
            "rewards": {"jpeg_compressibility": 1.0},
            "train": {
                "iterations": 100,
                "micro_batch": 8,
                "optimizer": "adamw",
                "precision": "fp32",
                "checkpointing": False,
            },
            "evaluate": {"every": 0, "prompts": str(prompts)},
            "checkpoint": {"every": 1},
        }
    )


def iterate(run: trainer.Trainer, phases: Phases) -> float:
    start = time.perf_counter()
    with phases.of("rest"):
        run.iterate()
        run.save()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3, help="timed ones; the median is reported")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    live = LiveBytes()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pipeline(root / "sd3")
        recipe = recipe_of(root / "sd3")
        encoding, phases = Phases(live), Phases(live)
        encode = PipelineModel.encode

        def encode_timed(*args):
            with encoding.of("encode"):
                return encode(*args)

        PipelineModel.encode = encode_timed
        try:
            with live:
                run = trainer.Trainer(recipe, root / "run", observer=phases)
        finally:
            PipelineModel.encode = encode
        live.move(tensors_of(run.model.transformer), "base weights")
        live.move(tensors_of(run.model.pipe.vae), "VAE")
        with live:
            iterate(run, phases)
        timed = []
        for _ in range(options.iterations):
            phases.start()
            timed.append((iterate(run, phases), phases.seconds))
        total, seconds = sorted(timed, key=lambda pair: pair[0])[len(timed) // 2]
        layers = run.model.transformer.config
    result = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],  # of the machine, this run included
        "transformer": {
            "layers": layers.num_layers,
            "width": layers.num_attention_heads * layers.attention_head_dim,
        },
        "samples": len(PROMPTS) * recipe.rollout.samples_per_prompt,
        "timesteps": recipe.train.timesteps,
        "seconds_iteration": total,
        "seconds_all_iterations": [whole for whole, _ in timed],
        "seconds_encode_once": encoding.seconds["encode"],
        "peak_rss_bytes": peak_rss_bytes(),
        "phases": {
            name: {
                "seconds": spent,
                "share": spent / total,
                "live_bytes": live.peaks[name].bytes if name in live.peaks else None,
            }
            for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
        },
        "encode_live_bytes": live.peaks["encode"].bytes,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
