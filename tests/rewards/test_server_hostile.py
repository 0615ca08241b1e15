"""Requests and connections that mean no good, and a reward that hangs: what the server keeps and answers."""

import base64
import concurrent.futures
import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from crd_fast.rewards import http as client
from tests.cli.conftest import command
from tests.rewards.serving import (
    TOKEN,
    ask,
    chunk,
    pictures,
    request,
    server,
    serving,
    wait_until_ready,
)
from tests.rewards.test_server import BAD

pytestmark = pytest.mark.usefixtures("served_rewards", "token")
connections = pytest.importorskip("crd_fast.rewards.connections", reason="needs uvicorn")


def raw(address, sent=b""):
    """A connection that has sent this much."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(sent)
    return connection


def two_headers(first, second):
    """A PNG whose second header, by which Pillow goes, claims another size than the first."""
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)) for size in (first, second)]
    data = chunk(b"IDAT", zlib.compress(bytes(second[1] * (3 * second[0] + 1))))
    return base64.b64encode(server.PNG_START + b"".join(parts) + data + chunk(b"IEND", b"")).decode()


def test_a_second_header_does_not_get_around_the_limit(address, monkeypatch):
    loaded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loaded.append(self.size))
    with pytest.raises(server.Refused) as refused:
        body = request(pictures(1), images=[two_headers((8, 8), (4000, 4000))])
        server.parse_score(body, server.Limits(pixels=8 * 64 * 64))
    assert refused.value.detail.startswith("images: image 0 is a broken PNG") and not loaded


@pytest.mark.parametrize(
    "metadata, status",
    [
        ([{"add": "x"}], 500),  # no reward of its own can say so
        ([{"x": float("nan")}], 400),
        ([{"x": "\ud800"}], 400),
    ],
)
def test_metadata_that_is_no_good(address, metadata, status):
    assert ask(address, "POST", "/score", request(pictures(1), metadata=metadata))[0] == status
    assert ask(address, "POST", "/score", request(pictures(1), prompts=["\ud800"]))[0] == 400


@pytest.mark.parametrize("include", [5, [5], [{}], [{"class": 5}], [{"class": "circle", "count": "x"}], None])
def test_metadata_that_a_reward_cannot_judge_is_the_clients_fault(include):
    worker = server.Worker("geneval")
    body = request(pictures(1), metadata=[{"tag": "counting", "include": include}])
    status, content = worker.answer("score", body, server.Limits())
    worker.end()
    assert status == 422 and content["detail"]


def test_what_is_refused_is_forgotten(address):
    """Without the garbage collector: no answer may leave the request in a cycle of references."""
    gc.collect()
    gc.disable()
    try:
        for _, body, status, _ in BAD:
            assert ask(address, "POST", "/score", body)[0] == status
        things = gc.get_objects()
        kept = [t for t in things if type(t) in (server.Refused, server.HTTPException)]
        fields = [t for t in things if type(t) is dict and t.keys() == {"images", "prompts", "metadata"}]
    finally:
        gc.enable()
    assert not kept and not fields


def test_a_reward_that_hangs_is_not_ready(served_rewards):
    served_rewards.loading.set()
    served_rewards.gate.clear()
    with serving("Slow", {"timeout": 0.2}) as address, concurrent.futures.ThreadPoolExecutor(1) as threads:
        wait_until_ready(address)
        first = threads.submit(ask, address, "POST", "/score", request(pictures(1)))
        status, answer, headers = first.result()
        assert (status, headers["Retry-After"]) == (503, "10") and b"hangs" in answer
        assert (
            ask(address, "GET", "/ready")[0] == ask(address, "POST", "/score", request(pictures(1)))[0] == 503
        )
        assert ask(address, "GET", "/health")[0] == 200
        served_rewards.gate.set()
        wait_until_ready(address)
        assert ask(address, "POST", "/score", request(pictures(1)))[0] == 200


HANGS = """
import threading
from pathlib import Path


def hangs(images, prompts, metadata):
    Path("asked").touch()
    threading.Event().wait()
"""


def test_ctrl_c_ends_a_server_whose_reward_hangs(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    started = subprocess.Popen(
        command("serve-reward", "hangs.py:hangs", "--port", 0),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with started, concurrent.futures.ThreadPoolExecutor() as threads:
        try:
            address = started.stdout.readline().split()[3]
            wait_until_ready(address)
            answer = threads.submit(ask, address, "POST", "/score", request(pictures(1)))
            while not (tmp_path / "asked").exists():
                time.sleep(0.02)
            started.send_signal(signal.SIGINT)
            _, said = started.communicate(timeout=120)
            assert "Traceback" not in said
        finally:
            started.kill()
        answer.exception()  # whatever a server that ends says


@pytest.mark.parametrize(
    "host, status",
    [
        ("evil.example", 421),
        ("evil.example:8701", 421),
        ("127.0.0.1.evil.example", 421),
        ("[", 421),
        ("localhost:8701", 200),
        ("127.0.0.1", 200),
        ("[::1]:8701", 200),
    ],
)
def test_without_a_token_the_host_must_be_this_machine(host, status):
    with serving("Brightness", token=None) as address:
        wait_until_ready(address)
        for path in ("/ready", "/health"):
            with raw(
                address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            ) as c:
                assert c.makefile("rb").readline().split()[1] == str(status).encode()


def test_with_a_token_any_host_will_do(address):
    head = f"GET /ready HTTP/1.1\r\nHost: elsewhere\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    with raw(address, head.encode()) as connection:
        assert connection.makefile("rb").readline().split()[1] == b"200"


def test_heads_and_bodies_that_do_not_come_are_dropped(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server, "GRACE", 0.3)
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving("Brightness", token=None) as address:
        wait_until_ready(address)
        for sent in (b"", b"POST /score HTTP/1.1\r\nHost: lo"):
            with raw(address, sent) as connection:
                assert connection.recv(100) == b""
        with raw(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
            answer = connection.recv(1000)  # the next head of the same connection
            assert b" 200 " in answer
            connection.sendall(b"GET /hea")
            assert connection.recv(1000) in (b"", b'{"reward":"served_rewards:Brightness"}')
            assert connection.recv(1000) == b""
        with raw(address, head + b"Content-Length: 100000\r\n\r\n{") as connection:
            assert b" 408 " in connection.recv(1000)


def test_connections_that_ask_nothing_make_room(monkeypatch):
    monkeypatch.setattr(connections, "MAX_OF_A_CLIENT", 8)
    with serving("Brightness", token=None) as address:
        wait_until_ready(address)
        idle = [raw(address, b"GET /ready HT") for _ in range(40)]
        assert client.HttpReward(address, retries=0).score(pictures(1), [""], [{}])
        for connection in idle[:30]:  # the ones that waited longest
            with connection, suppress(ConnectionResetError):
                assert connection.recv(10) == b""
        for connection in idle[30:]:
            connection.close()


def test_good_requests_among_hostile_ones_are_answered(tmp_path):
    """A small run of the load that the committed figures come from; memory takes the long one to judge."""
    from benchmarks import measure_reward_server as load

    command = [sys.executable, "-m", "benchmarks.measure_reward_server", "--requests", "40", "--clients", "4"]
    done = subprocess.run(
        [*command, "--size", "32", "--json", tmp_path / "load.json"],
        cwd=Path(load.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    result = json.loads((tmp_path / "load.json").read_text())
    found = {name: result[name] for name in ("right", "lost", "hostile_refused", "hostile_not_refused")}
    assert found == {"right": 40, "lost": 0, "hostile_refused": 160, "hostile_not_refused": 0}, done.stderr
    assert result["alive_at_the_end"]
