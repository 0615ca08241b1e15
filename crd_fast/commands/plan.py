"""crd-fast plan."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crd_fast.commands.terminal import Overrides, console, plain, say, say_warning
from crd_fast.errors import UserError
from crd_fast.quick_imports import quick_imports
from crd_fast.run.new_files import check_new, write_new

if TYPE_CHECKING:
    from crd_fast.config import Recipe


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of one that ships.", metavar="RECIPE")
    ] = None,
    set_: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="CARD|SIZE",
            help="A card like rtx-4090, or just its memory, like 24GB: which settings fit; hours for a card.",
        ),
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(help="Fraction of the card's peak that the hours assume. Default: 0.4.", metavar="E"),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="Choose timesteps, batch, iterations and size for a run of so long."),
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the plan as JSON as well. Never overwritten."),
    ] = None,
) -> None:
    """Say what a recipe will take on a GPU, in memory, hours and disk, before anything is downloaded.

    Peak memory of each phase by part, forwards and FLOPs of an iteration, disk and host memory; with `--gpu`,
    the largest micro-batches that fit and, where 1 does not, the cheapest settings that make it fit; with a
    card's name, hours: what no program can beat, and an estimate. The code that trains runs on tensors
    without content; kernels' own temporaries are not in it.

    `model.path` may be a folder with a pipeline's configs, builtin, builtin-ocr, or one of the models whose
    configs ship: sd3.5-medium, sd3.5-large, flux.1-dev, flux.2-klein-4b, qwen-image, z-image, sana-1.6b,
    or their hub ids.

    - `crd-fast plan --set model.path=sd3.5-medium --set model.quantization=nf4 --gpu 8GB`
    - `crd-fast plan sd3.5-medium-24gb --gpu rtx-4090`
    - `crd-fast plan sd3.5-medium-24gb --gpu rtx-4090 --hours 12`
    """
    import json

    with quick_imports():
        from crd_fast.config import build_recipe, load_recipe
        from crd_fast.plan.gpus import parse_gpu
        from crd_fast.rewards.registry import check_named

    if json_ is not None:
        check_new(json_, "--json")
    loaded = load_recipe(recipe or "builtin", set_ or [])
    for named in (loaded.rewards, loaded.eval_rewards):
        check_named(named)
    memory, card = parse_gpu(gpu) if gpu is not None else (None, None)
    if efficiency is not None and card is None:
        raise UserError("--efficiency: goes with the name of a card, like --gpu rtx-4090")
    if hours is not None and card is None:
        raise UserError("--hours: goes with the name of a card, like --gpu rtx-4090")
    if hours is not None and not 0 < hours < math.inf:
        raise UserError(f"--hours: expected more than 0, got {hours:g}")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise UserError(f"--efficiency: expected a fraction above 0 and at most 1, got {efficiency:g}")
    with console.status("planning"):
        with quick_imports():
            from crd_fast.plan import fit as fitting
            from crd_fast.plan import text
            from crd_fast.plan.cost import EFFICIENCY, cost

        efficiency = EFFICIENCY if efficiency is None else efficiency
        fits: list[fitting.Fit] = []
        if hours is not None and memory is not None and card is not None:
            from crd_fast.plan.hours import within

            fits.append(within(loaded, memory, card, hours, efficiency))
        elif memory is not None:
            for fit in fitting.fit(loaded, memory):
                if fits:  # what did not fit is said at once: the next may take seconds
                    say(fitting.verdict(fits[-1]))
                fits.append(fit)
        found = fits[-1].plan if fits else fitting.Planner(loaded).plan()
        if fits:
            loaded = build_recipe(loaded.model_dump(), fits[-1].overrides)
        takes = cost(loaded, found, card, efficiency)
    console.print(text.table(found, plain(loaded.model.path)))
    on_host = bool(fits) and not fits[-1].encodes_on_gpu
    lines = [*text.summary(found).splitlines(), *text.time_lines(takes)]
    if memory is not None and card is None:
        lines.append(text.name_a_card(memory))
    verdicts = [fitting.verdict(fit) for fit in fits]
    for line in [*lines, *text.space_lines(takes, on_host), *verdicts[-1:]]:
        say(line)
    if reason := unreadable_prompts(loaded):
        say_warning(f"training will be refused as long as this is so: {reason}")
    if json_ is not None:
        result = {"model": loaded.model.path, **found.to_json(), **takes.to_json()}
        result["host_bytes_beside_process"] = takes.host_bytes(on_host)
        if fits:
            result |= {"gpu_bytes": fits[-1].memory, "needed_bytes": fits[-1].needed, "verdicts": verdicts}
            result["overrides"] = fits[-1].overrides
        write_new(json_, "--json", (json.dumps(result, indent=1) + "\n").encode())
    if hours is not None and takes.hours is not None and takes.hours > hours:
        say(f"--hours {hours:g}: not reached; fewer iterations or a smaller model would be")
        raise typer.Exit(1)
    if fits and fits[-1].missing:
        raise typer.Exit(1)


def unreadable_prompts(recipe: Recipe) -> str | None:
    """Why training would refuse the recipe's prompts; None where they can be read."""
    from crd_fast.prompts.lists import evaluation_prompts, training_prompts

    try:
        training_prompts(recipe)
        if recipe.evaluate.every:
            evaluation_prompts(recipe)
    except UserError as error:
        return str(error)
    return None
