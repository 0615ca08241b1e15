"""crd-fast plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from crd_fast.commands.terminal import Overrides, console, say
from crd_fast.errors import UserError


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of one that ships.", metavar="[RECIPE]")
    ] = None,
    set_: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="A card's memory, like 24GB: which settings fit it.")
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the plan as JSON as well. Never overwritten."),
    ] = None,
) -> None:
    """Say what a recipe will take on a GPU before anything is downloaded or loaded.

    Peak memory of each phase by part, forwards and FLOPs of an iteration; with `--gpu`, the largest
    micro-batches that fit and, where 1 does not, the cheapest settings that make it fit. The code that trains
    runs on tensors without content; kernels' own temporaries are not in it.

    `model.path` may be a folder with a pipeline's configs, builtin, builtin-ocr, or one of the models whose
    configs ship: sd3.5-medium, sd3.5-large, flux.1-dev, flux.2-klein-4b, qwen-image, z-image, sana-1.6b,
    or their hub ids.

    - `crd-fast plan --set model.path=sd3.5-medium --set model.quantization=nf4 --gpu 8GB`
    """
    import json

    from crd_fast.config import load_recipe

    if json_ is not None and json_.exists():
        raise UserError(f"--json {json_}: already exists; choose another name")
    loaded = load_recipe(recipe or "builtin", set_ or [])
    with console.status("planning"):
        from crd_fast.plan import fit as fitting
        from crd_fast.plan.gpus import parse_memory

        if gpu is None:
            found, lines = fitting.Planner(loaded).plan(), []
        else:
            fits = list(fitting.fit(loaded, parse_memory(gpu)))
            found, lines = fits[-1].plan, [fitting.verdict(fit) for fit in fits]
    console.print(fitting.table(found, escape(loaded.model.path)))
    for line in [*fitting.summary(found).splitlines(), *lines]:
        say(line)
    if json_ is not None:
        result = {"model": loaded.model.path, **found.to_json()}
        if gpu is not None:
            result |= {"gpu_bytes": fits[-1].memory, "needed_bytes": fits[-1].needed, "verdicts": lines}
            result["overrides"] = fits[-1].overrides
        json_.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if gpu is not None and fits[-1].missing:
        raise typer.Exit(1)
