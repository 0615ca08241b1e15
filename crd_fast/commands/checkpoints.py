"""crd-fast sample and report: what becomes of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from crd_fast.commands.terminal import console, parse_settings, plain, say
from crd_fast.errors import UserError
from crd_fast.run.new_files import at_home, check_new, write_new
from crd_fast.sizes import Resolution, size_of_text

SOURCES = (
    "A run's folder, for its best checkpoint by the held-out score, or a checkpoint's; or a model without "
    "training: a pipeline's folder, a hub id, a recipe or its name, sd3.5-medium and the like, builtin or "
    "builtin-ocr."
)
Model = Annotated[
    str | None,
    typer.Option(help="Where the model is that the run began with, if it has moved.", metavar="FOLDER"),
]

Lora = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A LoRA to use the model with, of diffusers, peft, kohya or ai-toolkit; or the folder of one.",
    ),
]
Reward = Annotated[
    list[str] | None,
    typer.Option("--reward", metavar="NAME", help="As in `crd-fast score`. Repeatable."),
]
RewardSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting of the --reward, or of a benchmark's. Repeatable."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="SIDE or HEIGHTxWIDTH",
        help="Of the pictures in pixels; 768x512 stands upright, as `resolution: [768, 512]` in a recipe. "
        "Default: the recipe's.",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write it as JSON as well. Never overwritten.")
]


def typed_rewards(names: list[str] | None, settings: dict) -> dict | None:
    """As in a recipe, of what the command line names; None where it names none."""
    if not names:
        return None
    if settings and len(names) > 1:
        raise UserError("--set: goes with one --reward; give several their settings in a recipe")
    return {name: {**settings} if settings else 1.0 for name in names}


def typed_size(text: str | None) -> Resolution | None:
    """The value of `--size`. Raises UserError if that is no size."""
    try:
        return None if text is None else size_of_text(text)
    except ValueError as error:
        raise UserError(f"--size: {error}") from None


def write_json(path: Path, result: dict) -> None:
    write_new(path, "--json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def sample(
    source: Annotated[str, typer.Argument(help=SOURCES, metavar="SOURCE")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw. Repeatable: a row of the grid each.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="The same from a file, as for `eval`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write. Never overwritten.")] = Path("grid.png"),
    samples: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 8,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Default: the recipe's evaluation.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's evaluation.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    size: Size = None,
    lora: Lora = None,
    reward: Reward = None,
    set_: RewardSettings = None,
    json_: Json = None,
    model: Model = None,
) -> None:
    """Draw pictures with a checkpoint's trained weights, or with a model and a LoRA from elsewhere or none.

    - `crd-fast sample runs/my-run --prompt "a red bicycle"`
    - `crd-fast sample sd3.5-medium --guidance-scale 4.5 --lora my.safetensors --prompts prompts.txt`
    - with `--reward NAME` each picture's score is printed, and written by `--json FILE`
    """
    out = at_home(out)
    check_new(out, "--out")
    if json_ is not None:
        check_new(json_, "--json")
        if at_home(json_).resolve() == out.resolve():
            raise UserError(f"--json {json_}: expected another file than --out")
    rewards, pixels = typed_rewards(reward, parse_settings(set_ or [])), typed_size(size)
    if set_ and rewards is None:
        raise UserError("--set: is for the --reward")
    from crd_fast.prompts.source import PromptSource, check_text
    from crd_fast.train.inference import sample_grid

    entries: list = list(prompt or [])
    for text in entries:
        check_text(f"--prompt {text!a}", text)
    if prompts is not None:
        entries += PromptSource(prompts).all()
    if not entries:
        raise UserError("--prompt: expected at least one, or a file by --prompts")
    with console.status("sampling"):
        drawn = sample_grid(
            source,
            entries,
            out,
            samples=samples,
            guidance_scale=guidance_scale,
            steps=steps,
            seed=seed,
            base=model,
            lora=lora,
            size=pixels,
            rewards=rewards,
        )
    for row in drawn if rewards else ():
        scores = "  ".join(
            f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in row["scores"].items()
        )
        say(f"{scores}  {plain(row['prompt'])}")
    say(f"wrote {out}")
    if json_ is not None:
        write_json(json_, {"source": source, "picture": str(out), "columns": samples, "drawn": drawn})


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.", metavar="RUN")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Never overwritten. Default: report.html in the run's folder, written anew."
        ),
    ] = None,
) -> None:
    """Write report.html: curves, before and after, every setting, in one file that needs no network."""
    if out is not None:
        out = at_home(out)
        check_new(out, "--out")
    from crd_fast.run.report import write_report

    say(f"report: {write_report(run, out)}")
