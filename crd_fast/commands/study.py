"""crd-fast study."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from crd_fast.commands.terminal import console, say
from crd_fast.errors import UserError, did_you_mean


def study(
    name: Annotated[
        str | None,
        typer.Argument(help="A study that ships, or a YAML file. None: say which ship.", metavar="NAME"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of its runs and results, gone on with. Default: studies/NAME.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task. Repeatable.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm. Repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed. Repeatable.")] = None,
    results: Annotated[
        bool, typer.Option("--results", help="Run nothing, write the results of what is whole.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time, each a process that prints to seed-N.log.")
    ] = 1,
) -> None:
    """Train the arms of a study over several seeds and compare what they reached for what they spent.

    Each arm is a recipe: the task's with a few settings changed. The folder gets a run's folder for each arm
    and seed, `results.jsonl` with every evaluation, `table.md` and `plot.svg`. Runs that are whole are left
    alone and interrupted ones are resumed, so the command can be given again at any time.

    - `crd-fast study cost --task builtin --seed 42`
    - `crd-fast study methods --seed 42 --jobs 2`
    """
    from crd_fast.study.study import STUDIES, Cell, load_study, study_names

    if name is None:
        for known in study_names():
            say(f"{known}: {load_study(known).question}")
        return
    loaded = load_study(name)
    _check("task", task, loaded.tasks)
    _check("arm", arm, loaded.arms)
    _check("seed", seed, loaded.seeds)
    output = output or Path("studies") / (name if (STUDIES / f"{name}.yaml").exists() else Path(name).stem)
    place = output.absolute()  # a reward may change the working directory
    with console.status("loading torch"):
        from crd_fast.study.jobs import run_in_processes
        from crd_fast.study.results import write_results
        from crd_fast.study.run import run_in_turn, runs_left

    def wanted(cell: Cell) -> bool:
        return (
            (not task or cell.task in task)
            and (not arm or cell.arm in arm)
            and (not seed or cell.seed in seed)
        )

    left = [] if results else runs_left(loaded, place, wanted)
    if jobs > 1 and len(left) > 1:
        finished = run_in_processes(name, place, left, jobs, say)
    else:
        finished = run_in_turn(place, left, say)
    written = write_results(loaded, place, say)
    for file in written:
        say(f"written: {output / file.relative_to(place)}")
    if results and not written:
        say(f"no run in {output} is whole: nothing is written")
    if not finished:
        say("stopped; give the same command again to go on")
        raise typer.Exit(130)


def _check(option: str, given: list | None, known: Iterable) -> None:
    for value in given or []:
        if value not in known:
            near = did_you_mean(str(value), map(str, known)) or f"; known: {', '.join(map(str, known))}"
            raise UserError(f"--{option}: expected one of the study's, got {value}{near}")
