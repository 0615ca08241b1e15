"""crd-fast eval, sample and report: what becomes of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crd_fast.commands.terminal import AllowCode, console, parse_settings, plain, say, with_consent
from crd_fast.errors import UserError

if TYPE_CHECKING:
    from crd_fast.run.scores import Scores

Source = Annotated[
    str,
    typer.Argument(help="A run's folder, a checkpoint's folder, builtin or builtin-ocr.", metavar="SOURCE"),
]
Model = Annotated[
    str | None,
    typer.Option(help="Where the model is that the run began with, if it has moved.", metavar="FOLDER"),
]


def evaluate(
    source: Source,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts file (.jsonl with metadata, or text). Default: the recipe's.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Images per prompt. Default: the recipe's.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Euler steps. Default: the recipe's.")] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="geneval: its rules alone, and the table that papers print.", metavar="NAME"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the benchmark's reward. Repeatable."),
    ] = None,
    model: Model = None,
    allow_code: AllowCode = False,
) -> None:
    """Score a checkpoint on the recipe's evaluation prompts.

    Prints every reward's mean and what the rewards report, for GenEval the share of correct images by
    category; with standard errors, and for a run's checkpoint, on the prompts and seeds of its first
    evaluation, with the difference from that one, paired picture by picture.

    `--benchmark geneval` takes the recipe's GenEval reward, or else the built-in world's detector for the
    built-in model and Mask2Former with CLIP for others, and held-out prompts of the six categories; with
    `--prompts evaluation_metadata.jsonl --samples 4` it is the published benchmark.
    """
    from rich.table import Table

    from crd_fast.rewards import geneval_benchmark as benchmarks
    from crd_fast.train.inference import evaluate_checkpoint

    settings = parse_settings(set_ or [])
    if benchmark not in (None, benchmarks.GENEVAL):
        raise UserError(f"--benchmark: expected {benchmarks.GENEVAL}, got {benchmark!r}")
    if benchmark is None and settings:
        raise UserError("--set: is for the reward of a --benchmark; where the model is now: --model FOLDER")
    with console.status("evaluating"), with_consent():
        found = evaluate_checkpoint(
            source,
            prompts=prompts,
            change=(lambda values: benchmarks.geneval_recipe(values, settings)) if benchmark else dict,
            allow_code=allow_code,
            samples_per_prompt=samples,
            guidance_scale=guidance_scale,
            steps=steps,
            base=model,
        )
    if benchmark:
        console.print(benchmarks.geneval_table(source, found.metrics))
        return
    base = base_scores(source)
    table = Table(title=f"{plain(source)}: {found.metrics.pop('eval/images')} images")
    table.add_column("metric")
    for title in ("value", "± error", *(["since iteration 0"] if base else [])):
        table.add_column(title, justify="right")
    for name, value in found.metrics.items():
        if name.startswith("standard_error/"):
            continue
        name = name.removeprefix("eval/")
        errors = with_errors(found.scores, base, name) if found.scores else []
        table.add_row(name, f"{value:.3f}", *errors)
    console.print(table)
    say("± one standard error, prompts as the units" + ("; * p < 0.05, paired" if base else ""))


def base_scores(source: str) -> Scores | None:
    """What the pictures of a run's first evaluation got. source: its folder, or that of its checkpoint."""
    from crd_fast.run.scores import scores_of

    if not Path(source).is_dir():
        return None
    return scores_of(Path(source), 0) or scores_of(Path(source).parent.parent, 0)


def with_errors(scores: Scores, base: Scores | None, name: str) -> list[str]:
    """The cells beside a metric: its error and, where there is a base, the paired difference from it."""
    from crd_fast.run.scores import compare_metric, mean_of, measure_of

    measure = measure_of(scores, name)
    error = mean_of(scores, *measure)[1] if measure else math.nan
    cells = ["" if math.isnan(error) else f"{error:.3f}"]
    if base is None:
        return cells
    both = compare_metric(base, scores, name)
    if both is None or math.isnan(both.error):
        return [*cells, ""]
    return [*cells, f"{both.difference:+.3f} ± {both.error:.3f}{'*' if both.significant else ' '}"]


def sample(
    source: Source,
    prompt: Annotated[list[str], typer.Option(help="What to draw. Repeatable: a row of the grid each.")],
    out: Annotated[Path, typer.Option(help="The PNG to write. Never overwritten.")] = Path("grid.png"),
    samples: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 8,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Default: the recipe's evaluation.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's evaluation.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    model: Model = None,
) -> None:
    """Draw pictures with a checkpoint's trained weights, or with the built-in model."""
    from crd_fast.run.new_files import check_new

    out = out.expanduser()
    check_new(out, "--out")
    from crd_fast.train.inference import sample_grid

    with console.status("sampling"):
        sample_grid(
            source,
            prompt,
            out,
            samples=samples,
            guidance_scale=guidance_scale,
            steps=steps,
            seed=seed,
            base=model,
        )
    say(f"wrote {out}")


def report(run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")]) -> None:
    """Write report.html: curves, before and after, every setting, in one file that needs no network."""
    from crd_fast.run.report import write_report

    say(f"report: {write_report(run)}")
