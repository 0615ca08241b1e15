"""The reward server and the reward that calls it, over real sockets on this machine."""

import base64
import concurrent.futures
import json
import socket
import sys
import time

import numpy as np
import pytest

from crd_fast.errors import UserError
from crd_fast.rewards import Rewards
from crd_fast.rewards import http as client
from tests.rewards.serving import (
    TOKEN,
    ask,
    bomb,
    pictures,
    request,
    server,
    serving,
    wait_until_ready,
)

pytestmark = pytest.mark.usefixtures("served_rewards", "token")

# what is the matter, body, status, words of the answer
IMAGE = client.encode(pictures(1)[0])
BROKEN = base64.b64encode(base64.b64decode(IMAGE)[:200]).decode()
BAD = [
    ("not JSON", b"\x80\x04\x95pickle", 400, "expected JSON"),
    ("nested too deeply", b"[" * 100_000, 400, "expected JSON"),
    ("not UTF-8", b'{"images": "\xff"}', 400, "expected JSON"),
    ("a list", b"[]", 400, "expected an object"),
    ("nothing", b"", 400, "expected JSON"),
    ("a key missing", b'{"images": [], "prompts": []}', 400, "expected an object"),
    ("a key too many", request(pictures(1), more=1), 400, "and nothing else"),
    ("no images", request([]), 400, "at least one PNG"),
    ("images of numbers", request(pictures(1), images=[[1, 2]]), 400, "PNG in base64"),
    ("not base64", request(pictures(1), images=["?" * 40]), 400, "image 0 is not base64"),
    ("not ASCII", request(pictures(1), images=["é" * 40]), 400, "image 0 is not base64"),
    ("not a PNG", request(pictures(1), images=[base64.b64encode(b"GIF89a" * 9).decode()]), 400, "not a PNG"),
    ("half a PNG", request(pictures(1), images=[BROKEN]), 400, "image 0 is a broken PNG"),
    ("a claim of no pixels", request(pictures(1), images=[bomb(0, 0)]), 400, "broken PNG"),
    ("a small claim", request(pictures(1), images=[bomb(60, 60)]), 400, "broken PNG"),
    ("a huge claim", request(pictures(1), images=[bomb(60_000, 60_000)]), 413, "pixels in all"),
    ("too many pixels", request(pictures(3, 128)), 413, "pixels in all"),
    ("too many images", request(pictures(9)), 413, "expected at most 8, got 9"),
    ("two sizes", request([*pictures(1, 16), *pictures(1, 17)]), 400, "another size"),
    ("prompts missing", request(pictures(2), prompts=["a"]), 400, "as many prompts"),
    ("prompts of numbers", request(pictures(1), prompts=[1]), 400, "a list of strings"),
    ("metadata of strings", request(pictures(1), metadata=["a"]), 400, "a list of objects"),
    ("too long", request(pictures(1), prompts=["a" * 300_000]), 413, "at most 200000 bytes"),
    ("a prompt that the reward refuses", request(pictures(1), prompts=["refuse me"]), 422, "refused"),
]


@pytest.mark.parametrize("why, body, status, words", BAD, ids=[case[0] for case in BAD])
def test_bad_requests_are_refused_and_do_no_harm(address, why, body, status, words):
    got, answer, _ = ask(address, "POST", "/score", body)
    assert got == status
    assert words in json.loads(answer)["detail"]
    assert ask(address, "POST", "/score", request(pictures(1)))[0] == 200


@pytest.mark.parametrize(
    "method, path, keywords, status",
    [
        ("POST", "/score", {"token": None}, 401),
        ("POST", "/score", {"token": "wrong"}, 401),
        ("POST", "/score", {"token": TOKEN + "x"}, 401),
        ("POST", "/check", {"token": "é"}, 401),
        ("GET", "/ready", {"token": None}, 401),
        ("POST", "/score", {"content_type": "text/plain"}, 415),
        ("POST", "/score", {"content_type": "multipart/form-data; boundary=x"}, 415),
        ("PUT", "/score", {}, 405),
        ("POST", "/admin", {}, 404),
        ("GET", "/openapi.json", {}, 404),
        ("GET", "/health", {"token": None}, 200),
    ],
)
def test_other_requests(address, method, path, keywords, status):
    body = request(pictures(1)) if method in ("POST", "PUT") else None
    assert ask(address, method, path, body, **keywords)[0] == status


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01garbage\r\n\r\n", b"POST /score HTTP/1.1\r\n", b""]
)
def test_what_is_not_http(address, sent):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(sent)
    assert ask(address, "POST", "/score", request(pictures(1)))[0] == 200


def test_scores_as_the_reward_itself_does(address, served_rewards):
    images, prompts = pictures(20), ["x" * (i % 5) for i in range(20)]
    metadata = [{"add": 1000 * i, "prompt": "not this one"} for i in range(20)]
    reward = client.HttpReward(address, token_env="TOKEN", batch=8)
    reward.setup("cpu")
    reward.check([{"prompt": "fine"}] * 300)
    local = served_rewards.Brightness()
    expected = local.score(images, prompts, [{**m, "prompt": p} for m, p in zip(metadata, prompts)])
    assert reward.score(images, prompts, metadata) == expected


@pytest.mark.parametrize(
    "size, sizes", [(8, [6, 6, 8]), (7, [6, 6, 7, 1]), (2, [2, 1, 2, 1, 2, 1, 2, 1, 2, 2, 2, 2])]
)
def test_a_request_parts_no_prompt_that_fits(size, sizes):
    """Some rewards compare the pictures of a prompt with one another."""
    prompts = ["a"] * 3 + ["b"] * 3 + ["c"] * 3 + ["d"] * 3 + ["e"] * 8
    parts = list(client.batches(prompts, size))
    assert [part.stop - part.start for part in parts] == sizes
    assert [prompt for part in parts for prompt in prompts[part]] == prompts


def test_from_a_recipe(address):
    images, metadata = pictures(3), [{"prompt": "a" * i, "add": i} for i in range(3)]
    rewards = Rewards({"http": {"url": address, "token_env": "TOKEN", "weight": 2.0}})
    rewards.check(metadata)
    expected = [float(image.mean()) + 2 * i for i, image in enumerate(images)]
    assert rewards.score(images, metadata)["http"].tolist() == expected


def test_prompts_are_refused_before_any_work(address):
    reward = client.HttpReward(address, token_env="TOKEN")
    with pytest.raises(UserError, match="refused with 422 prompt 'refuse this': refused"):
        reward.check([{"prompt": "fine"}] * 300 + [{"prompt": "refuse this"}])


def test_a_wrong_token_is_said_once(address, monkeypatch):
    monkeypatch.setenv("TOKEN", "stale")
    with pytest.raises(UserError, match="refused with 401 expected the token"):
        client.HttpReward(address, token_env="TOKEN").setup("cpu")
    monkeypatch.delenv("TOKEN")
    with pytest.raises(UserError, match="expected TOKEN in the environment"):
        client.HttpReward(address, token_env="TOKEN")


def test_settings_reach_the_reward():
    with serving("Brightness", {"gain": 0.0}, token=None) as address:
        assert client.HttpReward(address).score(pictures(2), ["", "ab"], [{}, {}]) == [0.0, 2.0]


def test_a_reward_behind_a_server_records_no_graphs_either():
    with serving("records", token=None) as address:
        assert client.HttpReward(address).score(pictures(1), ["a"], [{}]) == [0.0]


def test_a_generator_behind_a_server_is_a_reward_s_own_code_as_well():
    with serving("yields", token=None) as address:
        assert client.HttpReward(address).score(pictures(1), ["a"], [{}]) == [0.0]
        with pytest.raises(UserError, match="refused with 500 reward served_rewards:yields: TypeError"):
            client.HttpReward(address).score(pictures(1), ["wrong"], [{}])


def test_what_the_reward_itself_does_not_reach_is_tried_again(served_rewards, monkeypatch):
    monkeypatch.setattr("crd_fast.rewards.scoring.FIRST_PAUSE", 0.001)
    for settings, words in (({"retries": 0}, "500 .*ConnectionError: no one there"), ({}, None)):
        served_rewards.calls.clear()
        with serving("third_time", settings, token=None) as address:
            reward = client.HttpReward(address)
            if words is None:
                assert reward.score(pictures(1), ["a"], [{}]) == [3.0]
            else:
                with pytest.raises(UserError, match=words):
                    reward.score(pictures(1), ["a"], [{}])


def test_workers_score_requests_at_the_same_time():
    images = pictures(2)
    with serving("both", {"workers": 2}) as address, concurrent.futures.ThreadPoolExecutor(2) as threads:
        wait_until_ready(address)
        reward = client.HttpReward(address, token_env="TOKEN")
        scores = list(threads.map(lambda i: reward.score(images[i : i + 1], [str(i)], [{}]), range(2)))
    assert scores == [[float(image.mean())] for image in images]


@pytest.mark.parametrize(
    "name, words", [("dies", "its worker ended with exit code 7"), ("fails", "KeyError")]
)
def test_a_failure_in_a_worker_is_the_servers(name, words):
    with serving(name, {"workers": 1}) as address:
        wait_until_ready(address)
        status, answer, _ = ask(address, "POST", "/score", request(pictures(1)))
        assert status == 500 and words in json.loads(answer)["detail"]


def test_eight_clients_lose_nothing(address):
    def one(number):
        images = np.full((8, 16, 16, 3), number, dtype=np.uint8)
        reward = client.HttpReward(address, token_env="TOKEN")
        return [reward.score(images, [""] * 8, [{"add": i} for i in range(8)]) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(one, range(8)))
    assert answers == [[[float(number + i) for i in range(8)]] * 5 for number in range(8)]


def test_a_full_queue_says_so_and_clients_wait(served_rewards):
    served_rewards.loading.set()
    served_rewards.gate.clear()
    with serving("Slow", requests=1) as address, concurrent.futures.ThreadPoolExecutor(4) as threads:
        wait_until_ready(address)
        patient = client.HttpReward(address, token_env="TOKEN", retries=50)
        first = threads.submit(patient.score, pictures(1), [""], [{}])
        for _ in range(200):  # until it has the one place, which one of these may have had when it came
            status, answer, headers = ask(address, "POST", "/check", b'{"metadata": []}')
            if status == 503:
                break
            time.sleep(0.02)
        assert (status, headers["Retry-After"]) == (503, "1") and b"too many requests" in answer
        waiting = threads.submit(
            client.HttpReward(address, token_env="TOKEN", retries=50).score, pictures(1), [""], [{}]
        )
        served_rewards.gate.set()
        assert len(first.result()) == len(waiting.result()) == 1


def test_not_ready_until_the_reward_is_loaded(served_rewards):
    served_rewards.loading.clear()
    served_rewards.gate.set()
    with serving("Slow") as address:
        assert ask(address, "GET", "/health")[0] == 200
        assert ask(address, "GET", "/ready")[0] == ask(address, "POST", "/score", b"{}")[0] == 503
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            ready = threads.submit(client.HttpReward(address, token_env="TOKEN").setup, "cpu")
            served_rewards.loading.set()
            ready.result()


@pytest.mark.parametrize(
    "reward, prompt, words",
    [
        ("wrong", "nan", "expected finite numbers, got nan"),
        ("wrong", "short", "expected 2 values, got 1"),
        ("wrong", "words", "expected finite numbers, got 'a'"),
        ("fails", "", "KeyError: 'somewhere'"),
        ("interrupted", "ctrl-c", "KeyboardInterrupt"),
        ("interrupted", "cancelled", "CancelledError"),
    ],
)
def test_a_reward_that_fails_is_the_servers_fault(reward, prompt, words):
    with serving(reward) as address:
        wait_until_ready(address)
        status, answer, _ = ask(address, "POST", "/score", request(pictures(2), prompts=[prompt] * 2))
        assert status == 500 and words in json.loads(answer)["detail"]
        with pytest.raises(UserError, match="refused with 500") as refused:
            client.HttpReward(address, token_env="TOKEN").score(pictures(2), [prompt] * 2, [{}] * 2)
        assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", [{}, {"workers": 1}])
@pytest.mark.parametrize(
    "name, words", [("Unreached", "ConnectionError: no one there"), ("Stumbles", "KeyError: 'tag'")]
)
def test_a_check_that_fails_has_refused_nothing(name, words, settings):
    """As without a server: a client that skips what others score would leave out these prompts for good."""
    with serving(name, settings) as address:
        wait_until_ready(address)
        status, answer, _ = ask(address, "POST", "/check", b'{"metadata": [{"prompt": "a"}]}')
    assert status == 500 and words in json.loads(answer)["detail"]


def test_others_need_a_token():
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(UserError, match="expected a token"):
            server.bind(host, 0, None)
    with server.bind("127.0.0.1", 0, None) as taken, pytest.raises(UserError, match="cannot listen there"):
        server.bind("127.0.0.1", taken.getsockname()[1], None)


def test_the_command_refuses_in_one_line(inside, monkeypatch):
    def run(*arguments):
        code, _, errors = inside("serve-reward", *arguments)
        assert code == 2
        lines = errors.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "did you mean 'geneval'" in run("genevel", "--port", "0")
    assert "unknown setting 'gian'" in run("served_rewards:Brightness", "--port", "0", "--set", "gian=2")
    for key in ("skip_others", "optional"):
        refused = run("geneval", "--port", "0", "--set", f"{key}=true")
        assert refused.endswith(f"reward geneval: {key}: expected in the recipe that asks the server")
    assert "expected a token" in run("geneval", "--host", "0.0.0.0", "--port", "0")
    assert "expected NOTHING in the environment" in run("geneval", "--token-env", "NOTHING")
    assert "expected KEY=VALUE" in run("geneval", "--port", "0", "--set", "gain")

    import crd_fast.rewards

    monkeypatch.setitem(sys.modules, "fastapi", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "crd_fast.rewards.server")
    monkeypatch.delattr(crd_fast.rewards, "server")
    assert "needs fastapi: pip install 'crd-fast[server]'" in run("geneval")
