"""A reward server in a thread of this process, and how the tests ask it."""

import base64
import json
import struct
import threading
import time
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import urllib3

from crd_fast.rewards import http as client

server = pytest.importorskip("crd_fast.rewards.server", reason="needs fastapi and uvicorn")

TOKEN = "correct-horse"
REWARDS = '''
import asyncio
import os
import threading
import time
from pathlib import Path

import numpy as np
from crd_fast.errors import UserError

gate = threading.Event()
loading = threading.Event()

class Brightness:
    """The mean of an image, plus what its metadata adds."""
    def __init__(self, gain=1.0):
        self.gain = gain
    def check(self, metadata):
        for entry in metadata:
            if "refuse" in entry["prompt"]:
                raise UserError(f"prompt {entry['prompt']!r}: refused")
    def score(self, images, prompts, metadata):
        self.check(metadata)
        return [
            self.gain * float(image.mean()) + entry.get("add", 0) + len(prompt)
            for image, prompt, entry in zip(images, prompts, metadata)
        ]

class Slow(Brightness):
    def setup(self, device):
        loading.wait(30)
    def score(self, images, prompts, metadata):
        gate.wait(30)
        return super().score(images, prompts, metadata)

class Unreached(Brightness):
    def check(self, metadata):
        raise ConnectionError("no one there")

class Stumbles(Brightness):
    def check(self, metadata):
        return [entry["tag"] for entry in metadata]

def wrong(images, prompts, metadata):
    return {"nan": [float("nan")] * len(images), "short": [0.0], "words": ["a"] * len(images)}[prompts[0]]

def fails(images, prompts, metadata):
    raise KeyError("somewhere")

def interrupted(images, prompts, metadata):
    raise {"ctrl-c": KeyboardInterrupt, "cancelled": asyncio.CancelledError}[prompts[0]]

def some(images, prompts, metadata):
    return [None if prompt == "skip" else 1.0 for prompt in prompts]

def records(images, prompts, metadata):
    """Whether torch keeps what a backward pass would need."""
    import torch
    return [torch.is_grad_enabled()] * len(images)

def yields(images, prompts, metadata):
    import torch
    for prompt in prompts:
        if prompt == "wrong":
            yield 1.0 + prompt
        yield torch.is_grad_enabled()

calls = []

def third_time(images, prompts, metadata):
    calls.append(None)
    if len(calls) < 3:
        raise ConnectionError("no one there")
    return [float(len(calls))] * len(images)

def dies(images, prompts, metadata):
    os._exit(7)

def both(images, prompts, metadata):
    """Comes back only if two calls are at work at once."""
    here = Path(__file__).parent
    (here / f"both-{prompts[0]}").touch()
    while len(list(here.glob("both-*"))) < 2:
        time.sleep(0.01)
    return [float(image.mean()) for image in images]
'''


@contextmanager
def serving(reward, settings=None, token=TOKEN, **limits):
    """A server in a thread of this process; gives its address."""
    worker = server.Worker(f"served_rewards:{reward}", settings)
    with server.bind("127.0.0.1", 0, token) as listening:
        running = server.make_server(worker, token, server.Limits(**limits))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()
            worker.end()


def wait_until_ready(address):
    for _ in range(2400):
        if ask(address, "GET", "/ready")[0] == 200:
            return
        time.sleep(0.05)
    raise AssertionError("the reward was not loaded")


def ask(address, method, path, body=None, token=TOKEN, content_type="application/json"):
    headers = {"Content-Type": content_type} if body is not None else {}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    response = urllib3.request(method, address + path, body=body, headers=headers, retries=False, timeout=30)
    return response.status, response.data, response.headers


def pictures(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def request(pixels, **changed):
    content = {
        "images": [client.encode(image) for image in pixels],
        "prompts": ["a"] * len(pixels),
        "metadata": [{}] * len(pixels),
    }
    return json.dumps(content | changed).encode()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width, height):
    """A few hundred bytes that claim to be a huge picture."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return base64.b64encode(
        server.PNG_START + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    ).decode()
