"""The command line: one function for each command, from `crd_fast.commands`."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from crd_fast import __version__
from crd_fast.commands.boundary import bounded
from crd_fast.commands.checkpoints import report, sample
from crd_fast.commands.evaluate import evaluate
from crd_fast.commands.export import export
from crd_fast.commands.init import init
from crd_fast.commands.plan import plan
from crd_fast.commands.recipes import recipes
from crd_fast.commands.rewards import score, serve_reward
from crd_fast.commands.study import study
from crd_fast.commands.terminal import console, say_error, say_warning
from crd_fast.commands.train import train
from crd_fast.errors import UserError
from crd_fast.once import warnings_once

LEAVING = 5.0  # seconds in which threads may end by themselves once a command is done

app = typer.Typer(
    help="Fine-tune a flow model with a black-box reward (Centered Reward Distillation) on one GPU, or none.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of crd-fast itself."""


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Also ask the hub whether it gives you this one: a short name or a hub id."),
    ] = None,
) -> None:
    """Say what this machine has, what will be used, what is missing and how to get it."""
    from crd_fast.doctor import render

    raise typer.Exit(render(console, model))


COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "recipes": recipes,
    "train": train,
    "plan": plan,
    "study": study,
    "eval": evaluate,
    "sample": sample,
    "export": export,
    "score": score,
    "report": report,
    "serve-reward": serve_reward,
    "doctor": doctor,
}
for name, command in COMMANDS.items():
    app.command(name=name)(bounded(command))


def run() -> None:
    """Entry point: `main` in a process that then ends, whatever hangs in threads that rewards have started.

    Python waits for those of a pool without end: for a reward's own, and for what a server is asked.
    """
    try:
        main()
    except SystemExit as ended:
        _leave_within(LEAVING, ended.code if isinstance(ended.code, int) else 1)
        raise


def _leave_within(seconds: float, code: int) -> None:
    left = threading.Event()
    atexit.register(left.set)  # what was registered last is called first, once no thread is waited for

    def leave() -> None:
        if not left.wait(seconds):
            with suppress(OSError, ValueError):  # a pipe that is read no further, a stream that is closed
                sys.stdout.flush()
            os._exit(code)

    threading.Thread(target=leave, name="leave", daemon=True).start()


def main() -> None:
    """Whatever a command raises is one line and exit code 2, never a traceback."""
    # bitsandbytes reports at import that an optional download for 4-bit layers on the CPU is not there
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers of image processors, that torchvision is not there
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers gives huggingface_hub an argument that it no longer takes
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
    try:
        with warnings_once(say_warning):
            code = app(prog_name="crd-fast", standalone_mode=False)
    except UserError as error:
        say_error(str(error))
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _say_usage(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _say_usage(error: Any) -> None:
    """One line for what typer refuses; its class is click's or typer's own, by typer's version."""
    message = " ".join(error.format_message().replace("Value error, ", "").split())
    path = error.ctx.command_path if getattr(error, "ctx", None) else "crd-fast"
    if message:  # empty where help was printed, as nothing else was asked for
        say_error(f"{message.rstrip('.')} ({path} --help)")


if __name__ == "__main__":
    run()
