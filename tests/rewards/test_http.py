"""The reward that calls a server, and servers that are slow, answer nonsense or are not there."""

import http.server
import json
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.rewards import Rewards
from crd_fast.rewards import http as client
from crd_fast.train.changes import check_changes
from crd_fast.train.trainer import Trainer


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def pictures(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@contextmanager
def impostor(respond, ready=b"{}"):
    """A server that answers in its own way: `respond(handler)`, and `ready`, or what it returns, to GET."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            says(ready() if callable(ready) else ready)(self)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            respond(self)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # the client hung up, as it should

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def says(body, status=200, **headers):
    def respond(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def head_drips(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
    for _ in range(40):
        handler.wfile.write(b"a")
        time.sleep(0.05)
    handler.wfile.write(b"\r\n\r\n")


def promises(handler):
    for _ in range(40):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


def drips(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "respond, words",
    [
        (says(b"<html>hello</html>"), "expected JSON, got '<html>hello</html>'"),
        (says(b"[1.0, 2.0]"), 'expected {"scores": [2 numbers or null]}, got [1.0, 2.0]'),
        (says(b'{"scores": [1.0]}'), "expected 2 values, got 1"),
        (says(b'{"scores": [1.0, NaN]}'), "expected finite numbers, got nan for image 1"),
        (says(b'{"scores": [1.0, "2"]}'), "expected finite numbers, got '2' for image 1"),
        (says(b'{"scores": null}'), "expected 2 values, got NoneType"),
        (says(b"", 302, Location="http://127.0.0.1:1/"), "refused with 302"),
        (says(b"[" * 200_000), "expected JSON"),
        (says(b"x" * 2_000_000), "bytes, got more"),
        (says(b"", 503, Retry_After="0"), "answered 503 (tried 3 times)"),
        (says(b"", 503, Retry_After="soon"), "answered 503 (tried 3 times)"),
        (lambda handler: time.sleep(3), "expected an answer within 0.5 s, got none (tried 3 times)"),
        (lambda handler: handler.connection.close(), "gave no whole answer (RemoteDisconnected)"),
        *((slow, "expected an answer within 0.5 s, got none (tried 3 times)")
          for slow in (drips, head_drips, promises)),
    ],
)  # fmt: skip
def test_a_server_that_is_slow_or_answers_nonsense(respond, words):
    timeout = 0.5 if "within" in words else 60
    with impostor(respond) as address:
        reward = client.HttpReward(address, timeout=timeout, retries=2)
        with pytest.raises(UserError) as refused:
            reward.score(pictures(2), ["a", "b"], [{}, {}])
    message = str(refused.value)
    assert message.startswith(f"reward http: {address}: ") and words in message
    assert "\n" not in message and len(message) < 450


def refuses_first(status):
    """A server whose first answer to `/check` is this one, and which scores whatever it is given."""
    answers = iter([(b'{"detail": "no"}', status)])

    def respond(handler):
        scores = handler.path == "/score"
        says(*((b'{"scores": [1.0]}', 200) if scores else next(answers, (b"{}", 200))))(handler)

    return respond


def plain(images, prompts, metadata):
    return [5.0] * len(images)


@pytest.mark.parametrize("workers", [{}, {"workers": 1}])
def test_only_what_the_server_s_reward_refuses_is_left_to_the_other_rewards(workers):
    """Once refused, never asked again: whatever else the server says must not stand for that."""
    entries = [{"prompt": "a"}, {"prompt": "b"}]

    def rewards(address):
        return Rewards({address: {"skip_others": True, "retries": 0, **workers}, plain: 1.0}, device="cpu")

    with impostor(refuses_first(422)) as address:
        found = rewards(address)
        found.check(entries)
        values = found.score(pictures(2), entries)[address]
        found.close()
    np.testing.assert_array_equal(values, [np.nan, 1.0])
    for status in (400, 401, 403, 500, 503):
        with impostor(refuses_first(status)) as address:
            found = rewards(address)
            with pytest.raises(UserError, match=f"^reward http: {address}: .*{status} no$"):
                found.check(entries)
            found.close()


def test_a_server_that_comes_back():
    answers = iter([(b"", 503), (b"", 429), (b'{"scores": [4.0, 2.0]}', 200)])
    with impostor(lambda handler: says(*next(answers))(handler)) as address:
        assert client.HttpReward(address).score(pictures(2), ["", ""], [{}, {}]) == [4.0, 2.0]


def test_a_server_that_is_down():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\) \(tried 3 times\)"):
        client.HttpReward(address, retries=2).setup("cpu")


@pytest.mark.parametrize("url", ["127.0.0.1:8701", "ftp://a", "http://", "http://a?b=c", 5])
def test_addresses_are_checked(url):
    with pytest.raises(UserError, match="url: expected http://HOST:PORT"):
        client.HttpReward(url)


def test_a_run_goes_on_with_a_server_that_has_moved(tmp_path, caplog):
    def recipe(**rewards):
        return build_recipe({"rewards": {"geneval": 1.0, **rewards}})

    first, moved, third = "http://127.0.0.1:8701", "http://127.0.0.1:8702", "https://other.example"
    check_changes(recipe(**{first: 0.5}).model_dump(), recipe(**{moved: {"weight": 0.5}}), tmp_path)
    assert f"changed: rewards.{first} -> {moved}" in caplog.text
    two = {first: 0.5, third: {"weight": 1.0, "timeout": 5}}
    check_changes(recipe(**two).model_dump(), recipe(**{first: 0.5, moved: 1.0}), tmp_path)
    for others in ({moved: 0.6}, {moved: 0.5, third: 0.5}, {}):
        with pytest.raises(UserError, match="made with another recipe"):
            check_changes(recipe(**{first: 0.5}).model_dump(), recipe(**others), tmp_path)


def named(name, count=1):
    """A server of the reward with this name, which scores `count` pictures."""
    answer = json.dumps({"scores": [float(i) for i in range(count)], "reward": name}).encode()
    return impostor(says(answer), ready=json.dumps({"reward": name}).encode())


def test_another_reward_at_the_address_is_noticed_where_scores_come():
    said = [b'{"scores": [4.0], "reward": "/srv/mine.py:b"}', b'{"scores": [5.0]}', b'{"scores": [6.0]}']
    answers = iter([said[1], said[0], b'{"scores": [1.0], "reward": "mine.py:c"}', said[2]])
    with impostor(lambda handler: says(next(answers))(handler), b'{"reward": "mine.py:b"}') as address:
        reward = client.HttpReward(address)
        reward.setup("cpu")
        assert [reward.score(pictures(1), [""], [{}]) for _ in range(2)] == [[5.0], [4.0]]
        with pytest.raises(
            UserError, match=f"^reward http: {address}: expected .* mine.py:b, got mine.py:c$"
        ):
            reward.score(pictures(1), [""], [{}])


def test_a_reward_in_workers_says_what_its_server_calls_it():
    """And no worker that begins later goes on with another: it is what a checkpoint keeps."""
    called = [b'{"reward": "mine.py:b"}', b'{"reward": "mine.py:c"}']
    ready = iter(called)
    with impostor(says(b'{"scores": [1.0]}'), ready=lambda: next(ready)) as address:
        rewards = Rewards({"http": {"url": address, "workers": 1}}, device="cpu")
        assert rewards.served == {"http": "mine.py:b"}
        (worker,) = rewards._rewards["http"]._workers
        worker.kill()
        with pytest.raises(UserError, match=r"^reward http: expected .* mine\.py:b, got mine\.py:c$"):
            rewards.score(pictures(1), [{"prompt": "a"}])
        rewards.close()


def test_another_reward_at_the_address_is_noticed_on_resume(tmp_path):
    """One that has moved is not, nor a server that does not say what its reward is called."""
    settings = ("rollout.prompts_per_iteration=1", "rollout.samples_per_prompt=2", "rollout.steps=2")
    settings += ("train.timesteps=1", "train.steps_per_iteration=1", "evaluate.every=0", "train.iterations=1")

    def trainer(address, resume=True):
        values = load_recipe("builtin", settings).model_dump() | {"rewards": {address: 1.0}}
        return Trainer(build_recipe(values), tmp_path / "run", resume)

    with named("mine.py:b", 2) as first, impostor(says(b'{"scores": [0, 1]}')) as foreign:
        assert trainer(first, resume=False).run()
        with named("/srv/mine.py:b", 2) as moved:
            trainer(moved)
        trainer(foreign)
    with named("mine.py:c", 2) as other:
        words = f"trained with another reward: at {other} mine.py:b answered, now mine.py:c; go on with"
        with pytest.raises(UserError, match=words):
            trainer(other)
