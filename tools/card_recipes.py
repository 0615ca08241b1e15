"""Recipes for cards of 8 to 80 GB, from plans: `python -m tools.card_recipes [--plan [MODEL ...]]`.

With `--plan` each model is planned on the common card of each size: its base in bfloat16, or in 4 bits, or
in 4 bits with its blocks streamed from the host, the first that fits; then what `plan --hours 24` changes so
that the run ends within a day. And in the published shape on the largest card. Plans are written to
`benchmarks/results/cards.json`; what is there already is not planned again. Then, with or without it, a
recipe for each model and card, and one in the published shape, is written to `crd_fast/recipes/`, and their
plans to `docs/cards.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from crd_fast.config import RECIPES, Recipe, build_recipe
from crd_fast.plan.cost import EFFICIENCY, cost
from crd_fast.plan.fit import RESERVED, Fit, fit
from crd_fast.plan.gpus import BY_NAME, GIB
from crd_fast.plan.hours import within
from crd_fast.plan.text import size_of
from crd_fast.run.machine import git_commit
from crd_fast.yaml_files import dump_yaml

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "benchmarks" / "results" / "cards.json", ROOT / "docs" / "cards.md"
CARDS = {8: "rtx-4060", 12: "rtx-3060", 16: "rtx-4080", 24: "rtx-4090", 80: "h100"}  # of each size, GB
PAPER = "paper"  # the published shape, on the largest card
SCHEDULES = {"old": "0/0.25/0.005/0.999", "sampler": "75/0/0.0075/0.999"}  # as published, for OCR
HOURS = 24
SAVINGS = ("model.quantization=nf4", "model.streaming=true")
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

LoRA of rank 32, 8-bit AdamW, the prompts and the reward of `ocr`: change `rollout`, `rewards` and `evaluate`
to your own. Run one with `crd-fast train flux.1-dev-12gb`, look at it with `--print-config`.

Each is what `crd-fast plan --gpu CARD --hours {hours}` makes of the published shape (48 prompts of 24
samples, all 10 timesteps, every pair anchored, 400 iterations, 512 x 512; `MODEL-paper`) on the common card
of its size: first what [costs no reward](cost.md), then smaller groups, down to 8, fewer prompts, fewer
iterations, smaller pictures; 75 iterations where that spares the pictures a step, otherwise at least 100.
Where all that does not suffice the hours say so.

Written by `python -m tools.card_recipes` from [plans](../benchmarks/results/cards.json), which name their
commits. They are plans: none of these recipes has been run on a GPU yet. GB are 2^30 bytes; `needs` is the
highest phase and {reserved} for the driver and libraries, a guess. Hours: what no program can beat, and at
{efficiency:.0%} of the card's peak, an assumption; the reward is read on one CPU thread, beside the rollout.
Micro-batches, of the update and of the rollout, change no number but by rounding. Text encoders that do not
fit work on the host, once for each prompt.
"""
COLUMNS = (
    "card",
    "base",
    "prompts x samples x timesteps",
    "iterations",
    "pixels",
    "micro-batches",
    "needs",
    "hours",
    "encoders",
)


def published(name: str, size: str) -> Recipe:
    """The published shape, with the model's base in bfloat16, and for PAPER the published schedules."""
    _, hub_id, guidance = MODELS[name]
    return build_recipe(
        {
            "model": {"path": hub_id},
            "rollout": {"prompts": "ocr-words", "resolution": 512},
            "rewards": {"ocr": {"mode": "scene", "workers": "auto"}},
            "loss": {"guidance_scale": guidance},
            "snapshots": SCHEDULES if size == PAPER else {},
            "evaluate": {"prompts": "ocr-words-heldout", "max_prompts": 96},
        }
    )


def planned(name: str, size: str) -> dict:
    """What the recipe for this card, or the published shape, changes and takes."""
    card = BY_NAME[CARDS[max(CARDS) if size == PAPER else int(size)]]
    start = published(name, size)
    found: Fit
    if size == PAPER:
        *_, found = fit(start, card.memory, SAVINGS)
    else:
        found = within(start, card.memory, card, HOURS, savings=SAVINGS)
    recipe = build_recipe(start.model_dump(), found.overrides)
    takes = cost(recipe, found.plan, card)
    return {
        "commit": git_commit(),
        "card": card.name,
        "overrides": found.overrides,
        "fits": not found.missing,
        "needed_bytes": found.needed,
        "host_bytes": found.plan.host_bytes,
        "encodes_on_gpu": found.encodes_on_gpu,
        "phases": {phase: peak.bytes for phase, peak in found.plan.phases.items()},
        "pflop_per_iteration": sum(found.plan.flops.values()) / 1e15,
        "hours": {"bound": takes.bound_hours, "estimate": takes.hours},
    }


def plan_model(name: str, plans: dict) -> None:
    for size in (*map(str, CARDS), PAPER):
        done = plans.setdefault(name, {})
        if size in done:
            continue
        done[size] = planned(name, size)
        hours, needed = done[size]["hours"]["estimate"], done[size]["needed_bytes"] / GIB
        print(
            f"{name} {size}: {needed:.1f} GB, {hours:.0f} h: {' '.join(done[size]['overrides'])}", flush=True
        )
        RESULT.write_text(json.dumps({"reserved_bytes": RESERVED, "plans": plans}, indent=1) + "\n")


def recipe_name(name: str, size: str) -> str:
    return f"{name}-{PAPER}" if size == PAPER else f"{name}-{size}gb"


def yaml_text(name: str, size: str, plan: dict) -> str:
    recipe = build_recipe(published(name, size).model_dump(), plan["overrides"])
    hours = plan["hours"]["estimate"]
    long = "a day" if hours <= HOURS else f"about {hours:.0f} hours"
    where = f"on a card of {size} GB, for {long}" if size != PAPER else "in the published shape"
    lines = [f"# {MODELS[name][0]} {where}. The plan is in docs/cards.md."]
    if size != PAPER:
        lines.append("# What decided the settings: docs/evidence.md, What the defaults follow from.")
    for section, values in recipe.model_dump(exclude_defaults=True).items():
        text = dump_yaml(values, default_flow_style=True, width=1000).strip()
        lines.append(f"{section + ':':10} {text}")
    return "\n".join(lines) + "\n"


def row(name: str, size: str, plan: dict) -> str:
    recipe = build_recipe(published(name, size).model_dump(), plan["overrides"])
    label = size + " GB" if size != PAPER else "published shape"
    if not plan["fits"]:
        return f"| {label}, {plan['card']} | does not fit |" + " |" * (len(COLUMNS) - 2)
    base = {"none": "bfloat16", "nf4": "NF4", "int8": "int8"}[recipe.model.quantization]
    rollout, train = recipe.rollout, recipe.train
    timesteps = len(recipe.training_steps()) if train.timesteps == "all" else train.timesteps
    host = f" + {size_of(plan['host_bytes'])} of the host" if plan["host_bytes"] else ""
    cells = [
        f"[{label}](../crd_fast/recipes/{recipe_name(name, size)}.yaml), {plan['card']}",
        base + (", streamed" if recipe.model.streaming else ""),
        f"{rollout.prompts_per_iteration} x {rollout.samples_per_prompt} x {timesteps}",
        str(train.iterations),
        str(rollout.resolution),
        f"{train.micro_batch} / {rollout.micro_batch}",
        f"{plan['needed_bytes'] / GIB:.1f} GB{host}",
        f"{plan['hours']['bound']:.3g} to {plan['hours']['estimate']:.3g}",
        "GPU" if plan["encodes_on_gpu"] else "host",
    ]
    return "| " + " | ".join(cells) + " |"


def write(plans: dict) -> None:
    page = [INTRODUCTION.format(reserved=f"{RESERVED / GIB:g}", hours=HOURS, efficiency=EFFICIENCY)]
    for name, sizes in plans.items():
        page += [f"## {MODELS[name][0]}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for size, plan in sizes.items():
            path = RECIPES / f"{recipe_name(name, size)}.yaml"
            if plan["fits"]:
                path.write_text(yaml_text(name, size, plan))
            else:
                path.unlink(missing_ok=True)
            page.append(row(name, size, plan))
        page.append("")
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
