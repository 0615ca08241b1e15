"""crd-fast train."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crd_fast.commands.boundary import leaving_traceback
from crd_fast.commands.terminal import AllowCode, Overrides, console, say, say_warning, with_consent
from crd_fast.errors import UserError, reason_of
from crd_fast.launched import launched_rank
from crd_fast.worlds import WORLDS

if TYPE_CHECKING:
    from crd_fast.config import Recipe
    from crd_fast.plan.cost import Cost


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe file, or the name of one that ships: builtin, builtin-lora, builtin-long, "
            "builtin-ocr, or of a model and a card, like flux.1-dev-12gb.",
            metavar="RECIPE",
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
        typer.Option(
            metavar="SIZE",
            help="Choose micro-batches, and which blocks are checkpointed, by the plan, for this much, like "
            "24GB.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="CARD", help="Say first what it takes on this card. Default: the GPU here."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Same as --set model.path=FOLDER: where the model is now."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective recipe as YAML and stop.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Fine-tune a model with a reward.

    With no arguments it trains the small model that ships with the package on the CPU, in minutes.

    Each iteration: the *sampler* generates K images for each of P prompts, the rewards score them, and the
    policy is updated by the centered regression of the log-ratio on the reward. The folder of the run holds
    `config.yaml`, `metrics.jsonl`, `tensorboard/`, `samples/`, `checkpoints/` and `report.html`.

    Ctrl-C finishes the iteration, writes a checkpoint and stops; a second one, and SIGTERM, do so after the
    present micro-batch. `--resume` goes on as if it had not stopped; what may be changed by `--set` or in the
    run's `config.yaml` is where things are (`--model`, prompts, addresses of rewards), iterations,
    micro-batches, checkpointing, evaluation, checkpoints, trackers and the learning rate. Rewards of your own
    in that file run only with `--allow-code`: it may have come from somebody else.
    """
    from crd_fast.config import build_recipe, load_recipe, read_yaml

    overrides = list(set_ or [])
    if max_iterations is not None:
        overrides.append(f"train.iterations={max_iterations}")
    if seed is not None:
        overrides.append(f"train.seed={seed}")
    if model is not None:
        overrides.append(f"model.path={json.dumps(model)}")  # JSON is YAML
    if resume is not None:
        resume = resume.expanduser()
        if recipe is not None or output is not None or gpu_memory is not None:
            raise UserError(
                "--resume: goes on with the run's own recipe and folder: no recipe, --output or --gpu-memory"
            )
        config_file = resume / "config.yaml"
        if not config_file.exists():
            raise UserError(f"--resume {resume}: expected the folder of a run, found no config.yaml in it")
        loaded = build_recipe(read_yaml(config_file), overrides, str(config_file))
        output = resume
    else:
        loaded = load_recipe(recipe or "builtin", overrides)
        name = Path(recipe or "builtin").name.removesuffix(".yaml")
        output = output.expanduser() if output else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if gpu_memory is not None:
        from crd_fast.plan.fit import for_training
        from crd_fast.plan.gpus import parse_memory
        from crd_fast.train.changes import differences

        named = loaded.model_dump()
        with console.status("planning"):
            loaded = for_training(loaded, parse_memory(gpu_memory))
        if not print_config and not launched_rank():
            for _, change in differences(named, loaded.model_dump()):
                say(f"by the plan: {change}")
    if print_config:
        print(loaded.to_yaml(), end="")
        return
    if resume is not None and not allow_code:
        from crd_fast.rewards import check_consent

        with with_consent():
            check_consent(loaded, str(resume / "config.yaml"))
    with leaving_traceback(output.absolute()):
        _run_training(loaded, output, resume is not None, gpu)


def _cost(recipe: Recipe, gpu: str | None) -> Cost | None:
    """What the run takes on the card that is asked for, or on the GPU here where its throughput is known.

    None where nobody asked and there is no such GPU, several processes share the work, or the model is a
    small one that ships or has no plan. Raises UserError for what was asked and cannot be said.
    """
    from crd_fast.plan.gpus import card_of_device, parse_gpu

    if gpu is not None:
        card = parse_gpu(gpu)[1]
        if card is None:
            raise UserError(f"--gpu: expected the name of a card, like rtx-4090, got {gpu!r}")
    else:
        import torch

        if recipe.model.path in WORLDS or not torch.cuda.is_available() or launched_rank() is not None:
            return None
        device = torch.cuda.get_device_properties(0)
        card = card_of_device(device.name, device.total_memory)
        if card is None:
            return None
    from crd_fast.plan.cost import cost
    from crd_fast.plan.planner import Planner

    try:
        return cost(recipe, Planner(recipe).plan(), card)
    except UserError:
        if gpu is not None:
            raise
        return None


def bytes_of_checkpoints(output: Path) -> int:
    """The bytes of a run's present checkpoints, which new ones will replace."""
    from crd_fast.weights.checkpoint import list_checkpoints

    files = (path for folder in list_checkpoints(output / "checkpoints") for path in folder.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _run_training(recipe: Recipe, output: Path, resume: bool, gpu: str | None) -> None:
    from crd_fast.run.log import refuse_existing, refuse_full

    main = not launched_rank()  # of the processes that torchrun started, or the only one
    console.quiet = not main
    if main and not resume:
        refuse_existing(output)
    with console.status("planning"):
        takes = _cost(recipe, gpu)
    if takes is not None:
        from crd_fast.plan.text import card_lines

        refuse_full(output, takes.disk["checkpoints"] - bytes_of_checkpoints(output))
        for line in card_lines(takes):
            say(line)
    with console.status("loading torch"):
        from crd_fast.run.metrics import read_metrics
        from crd_fast.run.observer import NOBODY, Observers
        from crd_fast.run.progress import Bars, before_and_after, gpu_memory
        from crd_fast.run.report import Refresh, write_report
        from crd_fast.train.trainer import Trainer
        from crd_fast.weights import checkpoint

    with Bars(console, recipe.train.iterations) as bars:
        trainer = Trainer(
            recipe,
            output,
            resume,
            observer=Observers(bars, Refresh(output.absolute(), recipe.train.iterations)) if main else NOBODY,
            row_flops=takes.plan.row_flops if takes else None,
        )
        bars.begin(trainer.iteration)
        say(f"run folder: {output}")
        if trainer.iteration >= recipe.train.iterations:
            say(f"nothing is left after iteration {trainer.iteration}; --max-iterations N asks for more")
        elif trainer.iteration:
            say(f"resuming after iteration {trainer.iteration}")
        finished = trainer.run()
    if main:
        records = read_metrics(trainer.output)
        if (table := before_and_after(trainer.output, records)) is not None:
            console.print(table)
        memory = gpu_memory(records)
        if memory is not None:
            say(memory)
        try:
            say(f"report: {output / write_report(trainer.output).name}")
        except Exception as error:  # the run is done, and is not to look as if it were not
            say_warning(f"the report is not written: {reason_of(error)}")
    if main and finished:
        say(f"weights: {output / checkpoint.find(trainer.output).relative_to(trainer.output)}")
        run = shlex.quote(str(output))
        say(f'next: crd-fast sample {run} --prompt "..." --out grid.png, {trainer.command("eval")}')
    if not finished:
        say(f"stopped after iteration {trainer.iteration}; go on with: {trainer.resume_command}")
        raise typer.Exit(130)
