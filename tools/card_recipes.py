"""Recipes for cards of 8 to 80 GB, from plans: `python -m tools.card_recipes [--plan [MODEL ...]]`.

With `--plan` each model is planned with its base in bfloat16, in 4 bits, and in 4 bits with its blocks
streamed from the host, each where the one before does not fit the smallest card, at micro-batches of 1, 4 and
24, until one does not fit the largest card: minutes each, written to `benchmarks/results/cards.json`; what is
there already is not planned again. Then, with or without it, a recipe for each model and card is written to
`crd_fast/recipes/`, and their plans to `docs/cards.md`. A card gets the first of the three that fits it: each
costs more than the one before, rounding, then time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from crd_fast.config import RECIPES, build_recipe
from crd_fast.models.pipeline import encodes_on_gpu
from crd_fast.plan.fit import RESERVED
from crd_fast.plan.gpus import GIB
from crd_fast.plan.planner import Planner
from crd_fast.run.machine import git_commit

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "benchmarks" / "results" / "cards.json", ROOT / "docs" / "cards.md"
CARDS = (8, 12, 16, 24, 80)
IN_UPDATE, IN_ROLLOUT = ("measure", "update", "step"), ("rollout", "decode")
SIZES = (1, 4, 24)  # the whole group at once needs a forward less
BASES = {
    "bfloat16": {},
    "NF4": {"quantization": "nf4"},
    "NF4, streamed": {"quantization": "nf4", "streaming": True},
}
MODELS = {  # name: title, hub id, guidance of the anchor
    "sd3.5-medium": ("Stable Diffusion 3.5 medium", "stabilityai/stable-diffusion-3.5-medium", 4.5),
    "sd3.5-large": ("Stable Diffusion 3.5 large", "stabilityai/stable-diffusion-3.5-large", 4.5),
    # its guidance is distilled into it: the anchor is the model as it is used
    "flux.1-dev": ("FLUX.1-dev", "black-forest-labs/FLUX.1-dev", 1.0),
    "flux.2-klein-4b": ("FLUX.2-klein 4B", "black-forest-labs/FLUX.2-klein-base-4B", 4.0),
    "qwen-image": ("Qwen-Image", "Qwen/Qwen-Image", 4.0),
    "z-image": ("Z-Image", "Tongyi-MAI/Z-Image", 4.5),
    "sana-1.6b": ("Sana 1.6B", "Efficient-Large-Model/Sana_1600M_512px_diffusers", 4.5),
}

INTRODUCTION = """# Recipes for cards of 8 to 80 GB

512 x 512, groups of 24, 48 prompts an iteration, LoRA of rank 32, activation checkpointing, 8-bit AdamW, the
prompts and the reward of `ocr`: change `rollout`, `rewards` and `evaluate` to your own. Run one with
`crd-fast train flux.1-dev-12gb`, look at it with `--print-config`.

Written by `python -m tools.card_recipes` from [plans](../benchmarks/results/cards.json), which name their
commits. They are plans: none of these recipes has been run on a GPU yet. GB are 2^30 bytes; `needs` is the
highest phase and {reserved} for the driver and libraries, a guess. Micro-batches are those of the update and
of the rollout, and change no number but by rounding. Text encoders that do not fit work on the host, once for
each prompt.
"""


def recipe(name: str, base: str, update: int, rollout: int) -> dict:
    """What the recipe says beside the defaults. update, rollout: micro-batches."""
    _, hub_id, guidance = MODELS[name]
    return {
        "model": {"path": hub_id, **BASES[base]},
        "rollout": {"prompts": "ocr-words", "resolution": 512, "micro_batch": rollout},
        "rewards": {"ocr": {"mode": "scene"}},
        "loss": {"guidance_scale": guidance},
        "train": {"micro_batch": update},
        "evaluate": {"prompts": "ocr-words-heldout", "max_prompts": 96},
    }


def plan_model(name: str, plans: dict) -> None:
    """Adds the model's plans, by base and micro-batch: bytes of each phase and of its parts."""
    for base in BASES:
        if plans.get(name) and choose(plans[name], min(CARDS)):
            return
        done = plans.setdefault(name, {}).setdefault(base, {})
        planner = None
        for size in SIZES:
            if any(smallest(plan) > max(CARDS) * GIB - RESERVED for plan in done.values()):
                break
            if str(size) in done:
                continue
            planner = planner or Planner(build_recipe(recipe(name, base, 1, 1)))
            found = planner.plan(size, size).to_json()
            done[str(size)] = {"commit": git_commit(), "phases": found["phases"]}
            phases = ", ".join(f"{p} {v['bytes'] / GIB:.2f}" for p, v in found["phases"].items())
            print(f"{name}, {base}, micro-batch {size}: {phases} GB", flush=True)
            RESULT.write_text(json.dumps({"reserved_bytes": RESERVED, "plans": plans}, indent=1) + "\n")


def smallest(plan: dict) -> int:
    """Bytes of the lesser of rollout and update: where this does not fit, neither does with more samples."""
    return min(plan["phases"]["rollout"]["bytes"], plan["phases"]["update"]["bytes"])


def choose(plans: dict, card: int) -> tuple[str, int, int] | None:
    """Base and micro-batches of update and rollout, the largest that fit. None if none fits."""
    room = card * GIB - RESERVED
    for base in plans:
        largest = []
        for phases in (IN_UPDATE, IN_ROLLOUT):
            sizes = [
                int(size)
                for size, plan in plans[base].items()
                if all(plan["phases"][phase]["bytes"] <= room for phase in phases)
            ]
            largest.append(max(sizes, default=0))
        if min(largest):
            return base, *largest
    return None


def yaml_text(name: str, card: int, chosen: tuple[str, int, int]) -> str:
    base, update, rollout = chosen
    lines = [f"# {MODELS[name][0]} on a card of {card} GB: base in {base}. The plan is in docs/cards.md."]
    for section, values in recipe(name, base, update, rollout).items():
        text = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()
        lines.append(f"{section + ':':10} {text}")
    return "\n".join(lines) + "\n"


def row(name: str, card: int, plans: dict, chosen: tuple[str, int, int]) -> str:
    base, update, rollout = chosen
    at_update, at_rollout = (plans[base][str(size)]["phases"] for size in (update, rollout))
    phases = {phase: at_update[phase] for phase in IN_UPDATE} | {
        phase: at_rollout[phase] for phase in IN_ROLLOUT
    }
    needed = max(phase["bytes"] for phase in phases.values()) + RESERVED
    encoders = encodes_on_gpu(at_update["encode"]["parts"]["text encoders"], card * GIB - RESERVED)
    cells = [
        f"[{card} GB](../crd_fast/recipes/{name}-{card}gb.yaml)",
        base,
        f"{update} / {rollout}",
        *(f"{phases[phase]['bytes'] / GIB:.1f}" for phase in ("rollout", "decode", "update")),
        f"{needed / GIB:.1f}",
        "GPU" if encoders else "host",
    ]
    return "| " + " | ".join(cells) + " |"


def write(plans: dict) -> None:
    page = [INTRODUCTION.format(reserved=f"{RESERVED / GIB:g}")]
    for name, bases in plans.items():
        page += [f"## {MODELS[name][0]}", ""]
        page += [
            "| card | base | micro-batches | rollout | decode | update | needs | text encoders |",
            "|---" * 8 + "|",
        ]
        for card in CARDS:
            path = RECIPES / f"{name}-{card}gb.yaml"
            chosen = choose(bases, card)
            if chosen is None:
                path.unlink(missing_ok=True)
                page.append(f"| {card} GB | does not fit |" + " |" * 6)
                continue
            path.write_text(yaml_text(name, card, chosen))
            page.append(row(name, card, bases, chosen))
        page.append("")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(page).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", nargs="*", metavar="MODEL", choices=list(MODELS))
    options = parser.parse_args()
    plans = json.loads(RESULT.read_text())["plans"] if RESULT.exists() else {}
    if options.plan is not None:
        for name in options.plan or MODELS:
            plan_model(name, plans)
    write({name: plans[name] for name in MODELS if name in plans})


if __name__ == "__main__":
    main()
