"""Load on the reward server: `python -m benchmarks.measure_reward_server`; writes results/reward-server.json.

Starts `crd-fast serve-reward` in a process of its own and sends it 1,000 requests of 8 images from 8 clients
on this machine, with malformed, oversized and unauthorised requests in between. Every answer is compared with
the score computed here, the server's resident memory is read as it goes, and what is wrong ends the script
with exit code 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

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
BAD_EVERY = 5  # good requests between the bad ones of a client


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
    good = result["lost"] == 0 and result["bad_requests_not_refused"] == 0 and result["alive_at_the_end"]
    sys.exit(not good)


def put_under_load(address: str, server: subprocess.Popen, arguments: argparse.Namespace) -> dict:
    process, memory, answered = psutil.Process(server.pid), [], Counter()
    lock, done = threading.Lock(), threading.Event()
    seconds: list[float] = []

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        reward = HttpReward(address, token_env="REWARD_TOKEN", retries=20, batch=IMAGES)
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
            if turn % BAD_EVERY == 0:
                status = bad_request(address, turn // BAD_EVERY + number)
                with lock:
                    answered["refused" if 400 <= status < 500 else "not refused"] += 1

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
        "bad_requests_refused": answered["refused"],
        "bad_requests_not_refused": answered["not refused"],
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


def bad_request(address: str, kind: int) -> int:
    """Malformed, oversized or unauthorised in turn; the status of the answer."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    content = {"images": ["iVBORw0KGgo="], "prompts": [""], "metadata": [{}]}
    bodies = (
        b"\x80\x04not JSON",
        json.dumps(content).encode(),
        json.dumps(content | {"prompts": ["x" * 5 * 2**20]}).encode(),
        json.dumps(content).encode(),
    )
    if kind % len(bodies) == 3:
        headers["Authorization"] = "Bearer guess"
    response = urllib3.request(
        "POST",
        f"{address}/score",
        body=bodies[kind % len(bodies)],
        headers=headers,
        retries=False,
        timeout=60,
    )
    return response.status


if __name__ == "__main__":
    main()
