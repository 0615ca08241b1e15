"""crd-fast eval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crd_fast.commands.checkpoints import (
    SOURCES,
    Json,
    Lora,
    Model,
    Reward,
    RewardSettings,
    Size,
    typed_rewards,
    typed_size,
    write_json,
)
from crd_fast.commands.terminal import (
    AllowCode,
    console,
    parse_settings,
    plain,
    say,
    say_warning,
    with_consent,
)
from crd_fast.errors import UserError
from crd_fast.run.new_files import check_new

if TYPE_CHECKING:
    from crd_fast.run.scores import Scores
    from crd_fast.train.evaluate import Evaluated
    from crd_fast.train.inference import Source


def evaluate(
    sources: Annotated[list[str], typer.Argument(help=f"{SOURCES} Two: compared.", metavar="SOURCE")],
    prompts: Annotated[
        str | None, typer.Option(help="Prompts file (.jsonl with metadata, or text). Default: the recipe's.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Images per prompt. Default: the recipe's.")
    ] = None,
    guidance_scale: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Default: the recipe's. Twice: of the first and of the second source."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Euler steps. Default: the recipe's.")] = None,
    size: Size = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the pictures. Default: that of every evaluation.")
    ] = None,
    reward: Reward = None,
    lora: Lora = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="geneval: its rules alone, and the table that papers print.", metavar="NAME"),
    ] = None,
    set_: RewardSettings = None,
    json_: Json = None,
    model: Model = None,
    allow_code: AllowCode = False,
) -> None:
    """Score a checkpoint, or a model without training, on held-out prompts; or compare two.

    Prints every reward's mean and what the rewards report, for GenEval the share of correct images by
    category; with standard errors, and for a run's checkpoint, on the prompts and seeds of its first
    evaluation, with the difference from that one, paired picture by picture.

    Two sources are asked for the same pictures, as the first that has a recipe has it, and compared picture
    by picture. `--lora` belongs to the last one, `--model` to a run.

    - `crd-fast eval runs/my-run sd3.5-medium --guidance-scale 1 --guidance-scale 4.5`
    - `crd-fast eval pipeline/ --lora my.safetensors --prompts prompts.txt --reward pickscore`

    `--benchmark geneval` takes the recipe's GenEval reward, or else the built-in world's detector for the
    built-in model and Mask2Former with CLIP for others, and held-out prompts of the six categories; with
    `--prompts evaluation_metadata.jsonl --samples 4` it is the published benchmark.
    """
    from crd_fast.rewards import geneval_benchmark as benchmarks

    settings, scales, pixels = parse_settings(set_ or []), guidance_scale or [], typed_size(size)
    if benchmark not in (None, benchmarks.GENEVAL):
        raise UserError(f"--benchmark: expected {benchmarks.GENEVAL}, got {benchmark!r}")
    if benchmark and (reward or len(sources) > 1):
        raise UserError("--benchmark: goes with one SOURCE and has its own reward")
    if benchmark is None and not reward and settings:
        raise UserError(
            "--set: is for a --reward or for that of a --benchmark; where the model is now: --model FOLDER"
        )
    if len(sources) > 2:
        raise UserError(f"eval: expected one SOURCE or two to compare, got {len(sources)}")
    if len(scales) not in (0, 1, len(sources)):
        raise UserError(f"--guidance-scale: expected one, or one for each SOURCE, got {len(scales)}")
    if json_ is not None:
        json_ = check_new(json_, "--json")
    from crd_fast.train.inference import asked, evaluated

    with console.status("evaluating"), with_consent():
        chosen = asked_for(
            sources,
            scales,
            lora,
            model,
            lambda source: asked(
                source,
                change=(lambda values: benchmarks.geneval_recipe(values, settings)) if benchmark else None,
                allow_code=allow_code,
                rewards=typed_rewards(reward, settings),
                size=pixels,
                prompts=prompts,
                samples_per_prompt=samples,
                guidance_scale=scales[0] if scales else None,
                steps=steps,
            ),
        )
        found = list(evaluated(chosen, seed))
    titles = [title_of(name, source) for name, source in zip(sources, chosen)]
    if benchmark:
        console.print(benchmarks.geneval_table(sources[0], found[0].metrics))
    elif len(found) == 2:
        print_both(titles, found)
    else:
        # what was asked otherwise than in the run is no change since its first evaluation
        same = not (reward or scales or steps or size)
        print_one(titles[0], found[0], base_scores(chosen[0]) if same else None)
    if json_ is not None:
        write_json(json_, as_json(sources, chosen, found, seed))


def asked_for(names: list[str], scales: list[float], lora, model, ask) -> list[Source]:
    """The sources with what is asked of them: of two, the first that has a recipe of its own leads."""
    from dataclasses import replace

    from crd_fast.config import build_recipe
    from crd_fast.train.inference import Source, check_moved

    found = [
        Source.of(name, model, lora if number == len(names) else None)
        for number, name in enumerate(names, start=1)
    ]
    check_moved(model, found)
    leading = next((source for source in found if source.own), found[0])
    led = ask(leading)
    found = [led if source is leading else source.like(led) for source in found]
    if len(scales) < 2:
        return found
    return [
        replace(source, recipe=build_recipe(source.recipe.model_dump(), [f"evaluate.guidance_scale={scale}"]))
        for source, scale in zip(found, scales)
    ]


def title_of(name: str, source: Source) -> str:
    """Which model, and how its pictures are drawn."""
    lora = f" with {source.lora.name}" if source.lora else ""
    scale = source.recipe.evaluate.guidance_scale
    return plain(f"{name}{lora}, " + (f"guidance scale {scale:g}" if scale > 1 else "without guidance"))


def print_one(title: str, found: Evaluated, base: Scores | None) -> None:
    from rich.table import Table

    from crd_fast.run.scores import error_of, shown_difference

    since = {name: shown_difference(base, found.scores, name) for name, _ in measures(found)}
    paired = any(since.values())  # not where other pictures are asked for than the first evaluation's
    table = Table(title=f"{title}: {found.metrics['eval/images']} images")
    table.add_column("metric", overflow="fold")
    for head in ("value", "± error", *(["since iteration 0"] if paired else [])):
        table.add_column(head, justify="right", no_wrap=True)
    for name, value in measures(found):
        error = error_of(found.scores, name)
        cells = [f"{value:.3f}", "" if math.isnan(error) else f"{error:.3f}"]
        table.add_row(name, *cells, *([since[name]] if paired else []))
    console.print(table)
    say("± one standard error, prompts as the units" + ("; * p < 0.05, paired" if paired else ""))


def print_both(titles: list[str], found: list[Evaluated]) -> None:
    from rich.table import Table

    from crd_fast.run.metrics import value_of
    from crd_fast.run.scores import shown, shown_change

    table = Table(title=f"{found[0].metrics['eval/images']} images each, same prompts and seeds")
    table.add_column("metric", overflow="fold")
    for head in ("A", "B", "B - A"):
        table.add_column(head, justify="right", no_wrap=True)
    first, second = found
    for name in dict(measures(first) + measures(second)):
        before, after = (value_of(one.metrics, f"eval/{name}") for one in found)
        difference = shown_change((before, after), first.scores, second.scores, name)
        table.add_row(name, shown(before), shown(after), difference)
    console.print(table)
    for letter, title in zip("AB", titles):
        say(f"{letter}: {title}")
    say("± one standard error, prompts as the units; * p < 0.05, paired")


def measures(found: Evaluated) -> list[tuple[str, float]]:
    """Each metric's name, without eval/, and value."""
    return [
        (name.removeprefix("eval/"), value)
        for name, value in found.metrics.items()
        if name != "eval/images" and not name.startswith("standard_error/")
    ]


def base_scores(source: Source) -> Scores | None:
    """What the pictures of its run's first evaluation got, unless the run was evaluated otherwise since."""
    from crd_fast.run.metrics import EVALUATED_ALIKE
    from crd_fast.run.scores import scores_of
    from crd_fast.weights.checkpoint import read_state

    if source.folder is None:
        return None
    state, run = read_state(source.folder), source.folder.resolve().parent.parent
    if state.get(EVALUATED_ALIKE):
        return None
    if not logged_in(run, state):
        say_warning(
            f"{source.folder}: another run's by its metrics; not compared with the first evaluation of {run}"
        )
        return None
    return scores_of(run, 0)


def logged_in(run: Path, state: dict[str, Any]) -> bool:
    """Whether a checkpoint's iteration is the run's by what both say of it, as far as they say something."""
    from crd_fast.run.metrics import MEASURED, read_metrics

    logged = {record["iteration"]: record for record in read_metrics(run, left_out=[])}
    kept, iteration = state.get("record") or {}, state["iteration"]
    if not logged or iteration == max(logged) + 1:  # which may have been saved and not logged
        return True
    found = logged.get(iteration, {})
    names = [name for name in kept if not name.startswith(MEASURED)]
    return repr([kept[name] for name in names]) == repr([found.get(name) for name in names])  # NaN is NaN


def as_json(names: list[str], sources: list[Source], found: list[Evaluated], seed: int | None) -> dict:
    """What was asked, what came out, and of two the paired differences; null where an error is not known."""
    from crd_fast.run.scores import compare_metric, error_of
    from crd_fast.train.evaluate import EVALUATION_SEED

    recipe = sources[0].recipe
    result: dict[str, Any] = {
        "prompts": recipe.evaluate.prompts,
        "samples_per_prompt": recipe.evaluate.samples_per_prompt,
        "steps": recipe.evaluate.steps,
        "resolution": recipe.evaluation_size,
        "seed": EVALUATION_SEED if seed is None else seed,
        "rewards": recipe.rewards,
        "images": found[0].metrics["eval/images"],
        "sources": [
            {
                "source": name,
                "lora": str(source.lora) if source.lora else None,
                "guidance_scale": source.recipe.evaluate.guidance_scale,
                "metrics": {
                    measure: {"value": value, "error": _number(error_of(one.scores, measure))}
                    for measure, value in measures(one)
                },
            }
            for name, source, one in zip(names, sources, found)
        ],
    }
    if len(found) == 2:
        compared = {
            name: compare_metric(found[0].scores, found[1].scores, name) for name, _ in measures(found[0])
        }
        result["differences"] = {
            name: {"difference": both.difference, "error": _number(both.error), "p": _number(both.p)}
            for name, both in compared.items()
            if both is not None
        }
    return result


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
