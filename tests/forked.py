"""`crd-fast`, and what several ranks do, in processes that are forked from one with the imports done.

They take seconds of a core, in a process of its own each time. That process has run nothing but imports: what
is forked from it is like one that has just begun, with signals, output, environment and exit code of its own.
"""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

IMPORTED = (
    *("crd_fast.cli", "crd_fast.train.trainer", "crd_fast.models.builtin", "crd_fast.run.report"),
    *("crd_fast.rewards.world_geneval", "crd_fast.weights.lora", "peft", "bitsandbytes", "tensorboard"),
    *("torch.distributed.fsdp", "pytest", "diffusers"),
)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(IMPORTED))


def begin(function, arguments, environment, folder, output):
    """Of the forked process: its place and output, then function(*arguments)."""
    for path, descriptor in zip(output, (1, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    gc.freeze()  # the imports are for good
    function(*arguments)


class Forked:
    """A process that runs function(*arguments); what it prints goes into files in the folder `into`."""

    def __init__(self, into, function, *arguments, folder=None, **environment):
        into.mkdir(parents=True, exist_ok=True)
        self.arguments = arguments
        self.output = (into / "stdout", into / "stderr")
        place = Path.cwd() if folder is None else folder
        parts = (function, arguments, os.environ | environment, place, self.output)
        self.process = CONTEXT.Process(target=begin, args=parts)
        self.process.start()
        self.pid = self.process.pid

    def ended(self):
        return self.process.exitcode is not None

    def wait(self, timeout=900):
        """What subprocess.run returns."""
        self.process.join(timeout)
        if not self.ended():
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in self.output]
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *texts)


def main_of(arguments):
    from crd_fast.cli import main

    sys.argv = ["crd-fast", *map(str, arguments)]
    main()


def crd_fast(into, *arguments, **options):
    """`crd-fast` with these arguments, begun."""
    return Forked(into, main_of, arguments, **options)


def two_ranks(into, function, *arguments, **options):
    """function(*arguments) in two processes of one group, as a launcher starts them: their results.

    Unlike a launcher it ends none because the other did.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    group["LOCAL_WORLD_SIZE"] = "2"
    ranks = [
        Forked(into / str(i), function, *arguments, RANK=str(i), LOCAL_RANK=str(i), **group, **options)
        for i in range(2)
    ]
    return [rank.wait() for rank in ranks]
