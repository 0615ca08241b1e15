"""Rewards of all kinds that tests copy to a folder of their own, where workers import them."""

import ctypes
import gc
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

from crd_fast.errors import UserError

HERE = Path(__file__).parent


def first_time(name):
    """Whether no process has come here yet."""
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_for(count, pattern):
    while len(list(HERE.glob(pattern))) < count:
        time.sleep(0.01)


def paints(images, prompts, metadata):
    images[:] = 0
    return [0.0] * len(images)


def mean(images, prompts, metadata, scale=1.0):
    return [scale * float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts)]


def process(images, prompts, metadata):
    images.copy()[:] = 0
    return [os.getpid()] * len(images)


def both(images, prompts, metadata):
    """Comes back only if two calls are at work at once."""
    (HERE / f"both-{prompts[0]}").touch()
    wait_for(2, "both-*")
    return mean(images, prompts, metadata)


def exits(images, prompts, metadata):
    if prompts[0] == "always" or (prompts[0] == "once" and first_time("exits")):
        os._exit(7)
    return mean(images, prompts, metadata)


def leaves(images, prompts, metadata):
    """Ends without what it has started: by itself, with its pipes, in the middle of an answer, or while
    nobody waits for it."""
    if prompts[0] == "answering":
        answers = [found for found in gc.get_objects() if isinstance(found, connection.Connection)]
        for answer in answers:
            os.write(answer.fileno(), struct.pack("!i", 100) + b"half")
    if prompts[0] in ("forked", "answering"):
        child = os.fork() or time.sleep(3600) or os._exit(0)
    else:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid
    (HERE / f"pid-{child}").touch()
    if prompts[0] == "idle":
        threading.Thread(target=_leaves_once_answered).start()
        return [os.getpid()] * len(images)
    os._exit(7)


def _leaves_once_answered():
    while not (HERE / "answered").exists():
        time.sleep(0.01)
    os._exit(7)


def killed(images, prompts, metadata):
    if first_time("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return mean(images, prompts, metadata)


def hangs(images, prompts, metadata):
    if prompts[0] == "always" or (prompts[0] == "once" and first_time("hangs")):
        ctypes.PyDLL(None).sleep(3600)  # holds Python's lock: nothing in this process can end it
    return mean(images, prompts, metadata)


def fails(images, prompts, metadata):
    raise {"key": KeyError("x"), "user": UserError("reward mine: no"), "exit": SystemExit(3)}[prompts[0]]


def large(images, prompts, metadata):
    import torch

    if first_time("large"):
        raise torch.OutOfMemoryError("no memory")
    return mean(images, prompts, metadata)


def remote(images, prompts, metadata):
    if first_time("remote-1") or first_time("remote-2"):
        raise ConnectionRefusedError("no one there")
    return mean(images, prompts, metadata)


def nothing(images, prompts, metadata):
    return [float("nan")] * len(images)


def starts_more(images, prompts, metadata):
    """Leaves a process behind, says so, and hangs; every time."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    for pid in (os.getpid(), child.pid):
        (HERE / f"pid-{pid}").touch()
    ctypes.PyDLL(None).sleep(3600)  # holds Python's lock


def pool(images, prompts, metadata):
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.map(abs, [-2.0] * len(images))


class Unsendable:
    def check(self, metadata):
        return lambda: 1

    def score(self, images, prompts, metadata):
        return [1.0] * len(images)

    def report(self, images, prompts, metadata):
        return {"odd": lambda: 1}


class Judge:
    def __init__(self, limit=3):
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        self.limit = limit

    def setup(self, device):
        self.device = device
        (HERE / f"loaded-{os.getpid()}").touch()

    def check(self, metadata):
        for entry in metadata:
            if "refuse" in entry["prompt"]:
                raise UserError(f"reward judge: refused {entry['prompt']!r}")

    def score(self, images, prompts, metadata):
        return [min(float(image.max()), self.limit) for image in images]

    def report(self, images, prompts, metadata):
        return {
            "found/meta": self.device == "meta",
            "found/images": len(images),
            "found/process": os.getpid(),
        }


class LargeAgain:
    """Ends its worker once, and finds no memory the first time that it is loaded again."""

    def setup(self, device):
        import torch

        if (HERE / "ended").exists() and first_time("loaded-again"):
            raise torch.OutOfMemoryError("no memory")

    def score(self, images, prompts, metadata):
        if first_time("ended"):
            os._exit(7)
        return mean(images, prompts, metadata)


class HangsIn:
    def __init__(self, method):
        self.method = method

    def check(self, metadata):
        if self.method == "check":
            time.sleep(3600)

    def report(self, images, prompts, metadata):
        time.sleep(3600)

    def score(self, images, prompts, metadata):
        return [0.0] * len(images)


class Broken:
    def setup(self, device):
        os._exit(9)

    def score(self, images, prompts, metadata):
        return [0.0] * len(images)
