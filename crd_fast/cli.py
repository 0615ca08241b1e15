"""The command line: crd-fast train, plan, eval, sample, score, report, doctor."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from crd_fast.errors import UserError

app = typer.Typer(
    help="Fine-tune a flow model with a black-box reward (Centered Reward Distillation) on one GPU, or none.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

Source = Annotated[
    str,
    typer.Argument(help="A run's folder, a checkpoint's folder, builtin or builtin-ocr.", metavar="SOURCE"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the recipe. Repeatable."),
]


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe file, or the name of one that ships: builtin, builtin-lora, builtin-long, "
            "builtin-ocr, or of a model and a card, like flux.1-dev-12gb.",
            metavar="[RECIPE]",
        ),
    ] = None,
    set_: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/NAME-DATE-TIME. Never overwritten.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder from its newest checkpoint.")
    ] = None,
    max_iterations: Annotated[
        int | None, typer.Option(min=1, help="Same as --set train.iterations=N.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same as --set train.seed=S.")] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Choose micro-batches that fit this much, like 24GB, by the plan."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective recipe as YAML and stop.")
    ] = False,
) -> None:
    """Fine-tune a model with a reward.

    With no arguments it trains the small model that ships with the package on the CPU, in minutes.

    Each iteration: the *sampler* generates K images for each of P prompts, the rewards score them, and the
    policy is updated by the centered regression of the log-ratio on the reward. The folder of the run holds
    `config.yaml`, `metrics.jsonl`, `tensorboard/`, `samples/`, `checkpoints/` and `report.html`.

    Ctrl-C finishes the iteration, writes a checkpoint and stops; `--resume` goes on as if it had not
    stopped.
    """
    from crd_fast.config import build_recipe, load_recipe, read_yaml

    overrides = list(set_ or [])
    if max_iterations is not None:
        overrides.append(f"train.iterations={max_iterations}")
    if seed is not None:
        overrides.append(f"train.seed={seed}")
    if resume is not None:
        if (
            recipe is not None
            or output is not None
            or gpu_memory is not None
            or any(not o.startswith("train.iterations=") for o in overrides)
        ):
            raise UserError(
                "--resume: goes on with the run's own recipe and folder; only --max-iterations can change"
            )
        config_file = resume / "config.yaml"
        if not config_file.exists():
            raise UserError(f"--resume {resume}: expected the folder of a run, found no config.yaml in it")
        loaded = build_recipe(read_yaml(config_file), overrides, str(config_file))
        output = resume
    else:
        loaded = load_recipe(recipe or "builtin", overrides)
        name = Path(recipe or "builtin").name.removesuffix(".yaml")
        output = output or Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
    if gpu_memory is not None:
        from crd_fast.plan.fit import for_training, parse_memory

        with console.status("planning"):
            loaded = for_training(loaded, parse_memory(gpu_memory))
    if print_config:
        print(loaded.to_yaml(), end="")
        return
    _run_training(loaded, output, resume is not None)


def _run_training(recipe, output: Path, resume: bool) -> None:
    from crd_fast.run.log import refuse_existing

    main = int(os.environ.get("RANK", 0)) == 0  # of the processes that torchrun started, or the only one
    console.quiet = not main
    if main and not resume:
        refuse_existing(output)
    with console.status("loading torch, the model and the prompts"):
        from crd_fast.run.metrics import read_metrics
        from crd_fast.run.progress import Bars, Quiet, before_and_after
        from crd_fast.run.report import write_report
        from crd_fast.train.trainer import Trainer

        trainer = Trainer(recipe, output, resume)
    _say(f"run folder: {output}")
    if trainer.iteration:
        _say(f"resuming after iteration {trainer.iteration}")
    with Bars(console, recipe.train.iterations, trainer.iteration) as bars:
        trainer.progress = bars if main else Quiet()
        finished = trainer.run()
    if main:
        table = before_and_after(read_metrics(output))
        if table is not None:
            console.print(table)
        _say(f"report: {write_report(output)}")
    if not finished:
        _say(f"stopped after iteration {trainer.iteration}; go on with: crd-fast train --resume {output}")
        raise typer.Exit(130)


@app.command()
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

        if gpu is None:
            found, lines = fitting.Planner(loaded).plan(), []
        else:
            fits = list(fitting.fit(loaded, fitting.parse_memory(gpu)))
            found, lines = fits[-1].plan, [fitting.verdict(fit) for fit in fits]
    console.print(fitting.table(found, escape(loaded.model.path)))
    for line in [*fitting.summary(found).splitlines(), *lines]:
        _say(line)
    if json_ is not None:
        result = {"model": loaded.model.path, **found.to_json()}
        if gpu is not None:
            result |= {"gpu_bytes": fits[-1].memory, "needed_bytes": fits[-1].needed, "verdicts": lines}
            result["overrides"] = fits[-1].overrides
        json_.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if gpu is not None and fits[-1].missing:
        raise typer.Exit(1)


@app.command(name="eval")
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
) -> None:
    """Score a checkpoint on prompts it was not trained on.

    Prints every reward's mean and what the rewards report, for GenEval the share of correct images by
    category.

    `--benchmark geneval` takes the recipe's GenEval reward, or else the built-in world's detector for the
    built-in model and Mask2Former with CLIP for others, and held-out prompts of the six categories; with
    `--prompts evaluation_metadata.jsonl --samples 4` it is the published benchmark.
    """
    from rich.table import Table

    from crd_fast.rewards import geneval_benchmark as benchmarks
    from crd_fast.train.inference import evaluate_checkpoint

    settings = _settings(set_ or [])
    if benchmark not in (None, benchmarks.GENEVAL):
        raise UserError(f"--benchmark: expected {benchmarks.GENEVAL}, got {benchmark!r}")
    if benchmark is None and settings:
        raise UserError("--set: is for the reward of a --benchmark")
    with console.status("evaluating"):
        metrics = evaluate_checkpoint(
            source,
            prompts=prompts,
            change=(lambda values: benchmarks.geneval_recipe(values, settings)) if benchmark else dict,
            samples_per_prompt=samples,
            guidance_scale=guidance_scale,
            steps=steps,
        )
    if benchmark:
        console.print(benchmarks.geneval_table(source, metrics))
        return
    table = Table(title=escape(f"{source}: {metrics.pop('eval/images')} images"))
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.3f}")
    console.print(table)


@app.command()
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
) -> None:
    """Draw pictures with a checkpoint's trained weights, or with the built-in model."""
    from crd_fast.train.inference import sample_grid

    if out.exists():
        raise UserError(f"--out {out}: already exists; choose another name")
    with console.status("sampling"):
        sample_grid(
            source, prompt, out, samples=samples, guidance_scale=guidance_scale, steps=steps, seed=seed
        )
    _say(f"wrote {out}")


@app.command()
def score(
    reward: Annotated[
        str,
        typer.Option(
            help="A reward that ships (ocr, geneval, ...), package.module:name, or a server's address."
        ),
    ],
    images: Annotated[Path, typer.Option(help="A folder of pictures, taken in order of their names.")],
    prompts: Annotated[
        Path,
        typer.Option(
            help="A line for each picture: text, or .jsonl with the metadata that the reward needs."
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the reward, as in a recipe. Repeatable."
        ),
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the scores as JSON as well. Never overwritten."),
    ] = None,
) -> None:
    """Score pictures with any reward, without a model or a run.

    The first picture by name belongs to the first prompt, and so on. Prints each picture's score and their
    mean; what comes out is what training and evaluation would see.

    - `crd-fast score --reward ocr --images pictures --prompts prompts.txt`
    - `crd-fast score --reward ocr --set mode=word ...` reads pictures that show one word and nothing else
    - `crd-fast score --reward my_module:my_reward ...` tries a reward of your own
    """
    import json

    from rich.table import Table

    from crd_fast.rewards.pictures import score_folder

    if json_ is not None and json_.exists():
        raise UserError(f"--json {json_}: already exists; choose another name")
    settings = _settings(set_ or [])
    with console.status("scoring"):
        rows = score_folder(reward, settings, images, prompts)
    mean = sum(row["score"] for row in rows) / len(rows)
    table = Table()
    for column in ("picture", "prompt"):
        table.add_column(column, overflow="fold")
    table.add_column("score", justify="right")
    for row in rows:
        table.add_row(escape(row["image"]), escape(row["prompt"]), f"{row['score']:.4f}")
    console.print(table)
    _say(f"{reward}: mean {mean:.4f} of {len(rows)} pictures")
    if json_ is not None:
        result = {"reward": reward, "settings": settings, "mean": mean, "scores": rows}
        json_.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")]) -> None:
    """Write report.html: curves, before and after, every setting, in one file that needs no network."""
    from crd_fast.run.report import write_report

    _say(f"report: {write_report(run)}")


@app.command(name="serve-reward")
def serve_reward(
    reward: Annotated[str, typer.Argument(help="A reward's name, or module:name.", metavar="REWARD")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the reward. Repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8701,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The environment variable with the token that clients must show."),
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Images a request.")] = 64,
    max_megapixels: Annotated[int, typer.Option(min=1, help="All images of a request.")] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="A request's body.")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="Requests at once; further ones are told to wait.")] = 16,
) -> None:
    """Score images for other processes and machines, over HTTP.

    A recipe calls it with `rewards: {http: {url: "http://127.0.0.1:8701", token_env: NAME}}`. It listens to
    this machine alone unless told otherwise, and to others only with a token.
    """
    try:
        from crd_fast.rewards import server
    except ModuleNotFoundError as error:
        raise UserError(f"serve-reward: needs {error.name}: pip install 'crd-fast[server]'") from None
    from crd_fast.rewards.http import token_from

    token = None if token_env is None else token_from(token_env)
    limits = server.Limits(
        images=max_images, pixels=max_megapixels * 2**20, bytes=max_megabytes * 2**20, requests=queue
    )
    with server.bind(host, port, token) as listening:
        worker = server.Worker(reward, _settings(set_ or []))
        address = f"http://{host}:{listening.getsockname()[1]}"
        needed = "with a token" if token else "without a token"
        _say(f"serving {reward} at {address} {needed}")
        server.serve(worker, listening, token, limits)


@app.command()
def doctor() -> None:
    """Say what this machine has, what will be used, what is missing and how to get it."""
    from crd_fast.doctor import render

    raise typer.Exit(render(console))


def _say(line: str) -> None:
    """Prints one line as it is: not broken where the terminal ends, so that paths in it can be used."""
    console.print(escape(line), highlight=False, soft_wrap=True)


def _settings(pairs: list[str]) -> dict:
    """`KEY=VALUE`, the value as YAML."""
    import yaml

    settings = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        try:
            settings[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            separator = ""
        if not key or not separator:
            raise UserError(f"--set: expected KEY=VALUE, got {pair!r}")
    return settings


def main() -> None:
    """Entry point: a UserError is one line and exit code 2, never a traceback."""
    # bitsandbytes reports at import that an optional download for 4-bit layers on the CPU is not there
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers of image processors, that torchvision is not there
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        errors.print(
            f"[red]error:[/red] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
