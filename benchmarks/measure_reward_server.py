"""Load on the reward server: `python -m benchmarks.measure_reward_server`; writes results/reward-server.json.

Starts `crd-fast serve-reward` in a process of its own and sends it 1,000 requests of 8 images from 8 clients
on this machine, with four times as many hostile ones in between: malformed, oversized, unauthorised, pictures
with a second header, bodies that end early, and connections that are left with half a head. Every answer is
compared with the score computed here, the server's resident memory is read as it goes, and what is wrong (a
good request lost, a hostile one answered otherwise than by 4xx, more than 10 % of memory gained after the
first fifth) ends the script with exit code 1.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import urllib3

from crd_fast.rewards import load
from crd_fast.rewards.http import HttpReward
from crd_fast.run.machine import cpu_name, git_commit

REWARD = "colorfulness"
RESULT = Path(__file__).parent / "results" / "reward-server.json"
TOKEN = "loopback-only"
IMAGES = 8
HOSTILE = 4  # requests for each good one
GAIN = 1.1  # of memory, at most
LEFT_OPEN = 16  # connections of a client that ask nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    os.environ["REWARD_TOKEN"] = TOKEN
    command = [sys.executable, "-m", "crd_fast", "serve-reward", REWARD]
    command += ["--port", "0", "--token-env", "REWARD_TOKEN", "--max-megabytes", "4"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    try:
        address = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
        HttpReward(address, token_env="REWARD_TOKEN", retries=30).setup("cpu")
        result = put_under_load(address, server, arguments)
    finally:
        server.terminate()
        server.wait(30)
    print(json.dumps(result, indent=1))
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    good = result["lost"] == 0 and result["hostile_not_refused"] == 0 and result["alive_at_the_end"]
    kept = result["rss_bytes_highest"] <= GAIN * result["rss_bytes_after_a_fifth"]
    sys.exit(not (good and kept))


def put_under_load(address: str, server: subprocess.Popen, arguments: argparse.Namespace) -> dict:
    process, memory, answered = psutil.Process(server.pid), [], Counter()
    lock, done = threading.Lock(), threading.Event()
    seconds: list[float] = []

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        reward = HttpReward(address, token_env="REWARD_TOKEN", retries=20, batch=IMAGES)
        hostile = Hostile(address)
        for turn in range(arguments.requests // arguments.clients):
            images = rng.integers(0, 256, (IMAGES, arguments.size, arguments.size, 3), dtype=np.uint8)
            started = time.perf_counter()
            try:
                got = reward.score(images, [""] * IMAGES, [{}] * IMAGES)
            except Exception as error:  # whatever it is, the request was lost
                print(f"client {number}: {error}", file=sys.stderr)
                got = None
            took = time.perf_counter() - started
            with lock:
                answered["right" if got == expected(images) else "lost"] += 1
                seconds.append(took)
            for kind in range(HOSTILE):
                refused = hostile.ask(HOSTILE * turn + kind + number)
                with lock:
                    answered["refused" if refused else "not refused"] += 1
        hostile.close()

    def watch() -> None:
        while not done.wait(0.2):
            memory.append((sum(answered.values()), process.memory_info().rss))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(arguments.clients) as clients:
        list(clients.map(client, range(arguments.clients)))
    total = time.perf_counter() - started
    done.set()
    watcher.join()
    warm = [rss for count, rss in memory if count >= 0.2 * sum(answered.values())] or [memory[-1][1]]
    return {
        "machine": f"{os.cpu_count()} cores of {cpu_name()}",
        "commit": git_commit(),
        "reward": REWARD,
        "requests": arguments.requests // arguments.clients * arguments.clients,
        "clients": arguments.clients,
        "images_a_request": IMAGES,
        "size": arguments.size,
        "right": answered["right"],
        "lost": answered["lost"],
        "hostile_refused": answered["refused"],
        "hostile_not_refused": answered["not refused"],
        "alive_at_the_end": server.poll() is None,
        "seconds": round(total, 2),
        "requests_a_second": round(len(seconds) / total, 1),
        "median_seconds": round(float(np.median(seconds)), 4),
        "slowest_seconds": round(max(seconds), 3),
        # of the part after the first fifth, in which caches and thread pools fill
        "rss_bytes_after_a_fifth": warm[0],
        "rss_bytes_at_the_end": warm[-1],
        "rss_bytes_highest": max(warm),
    }


def expected(images: np.ndarray) -> list[float]:
    reward, _ = load(REWARD)
    return [float(value) for value in getattr(reward, "score", reward)(images, [""] * IMAGES, [{}] * IMAGES)]


class Hostile:
    """A client that means no good: eight kinds of requests in turn."""

    def __init__(self, address: str):
        self.address, self.host, self.open = address, urlsplit(address), deque[socket.socket]()
        content = {"images": ["iVBORw0KGgo="], "prompts": [""], "metadata": [{}]}
        self.bodies = (
            b"\x80\x04not JSON",
            json.dumps(content).encode(),
            json.dumps(content | {"prompts": ["x" * 5 * 2**20]}).encode(),
            json.dumps(content).encode(),  # with another token
            json.dumps(content | {"images": ["?" * 3 * 2**20]}).encode(),  # refused once it has been parsed
            json.dumps(content | {"images": [two_headers()]}).encode(),
        )

    def ask(self, number: int) -> bool:
        """Whether the answer was 4xx, or there can be none."""
        kind = number % (len(self.bodies) + 2)
        if kind == len(self.bodies):
            with self.connection() as connection:
                connection.sendall(self.head(100) + b"{")  # 99 bytes short
            return True
        if kind > len(self.bodies):
            self.open.append(connection := self.connection())
            with suppress(OSError):  # it may be closed already
                connection.sendall(self.head(100)[:40])
            if len(self.open) > LEFT_OPEN:
                self.open.popleft().close()
            return True
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        if kind == 3:
            headers["Authorization"] = "Bearer guess"
        body = self.bodies[kind]
        while True:
            response = urllib3.request(
                "POST", f"{self.address}/score", body=body, headers=headers, retries=False, timeout=60
            )
            if response.status != 503:  # a full queue
                return 400 <= response.status < 500
            time.sleep(0.02)

    def connection(self) -> socket.socket:
        return socket.create_connection((self.host.hostname, self.host.port), timeout=60)

    def head(self, length: int) -> bytes:
        lines = ("POST /score HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        return "\r\n".join(
            [*lines, f"Authorization: Bearer {TOKEN}", f"Content-Length: {length}", "", ""]
        ).encode()

    def close(self) -> None:
        for connection in self.open:
            connection.close()


def two_headers() -> str:
    """A PNG, in base64, that claims 8 x 8 pixels first and 8,000 x 8,000 then."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
        (b"IHDR", struct.pack(">IIBBBBB", 8000, 8000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(8000 * 24001))),
        (b"IEND", b""),
    ):
        parts.append(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    return base64.b64encode(b"".join(parts)).decode()


if __name__ == "__main__":
    main()
