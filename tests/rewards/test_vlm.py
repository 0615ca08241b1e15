"""A judge behind OpenAI's chat protocol, asked of a server that speaks it."""

import base64
import http.server
import io
import json
import math
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.rewards import Rewards, needs_consent
from crd_fast.rewards import http as client
from crd_fast.rewards.vlm import MOST_UNANSWERED, VLM

METADATA = [{"prompt": "a red square", "noun": "square"}] * 3


class Speaks:
    """A server of one model, for which a picture is as good as it is red. `asked`: the requests so far."""

    def __init__(self, say=None, models=("looks",), refuse=(), slow=0.0):
        self.say, self.models, self.refuse, self.slow = say or by_redness, models, list(refuse), slow
        self.asked, self.headers = [], []
        self.at_work = self.most_at_work = 0
        self.lock = threading.Lock()

    @contextmanager
    def running(self):
        mine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                assert self.path == "/v1/models"
                self.answer(200, {"object": "list", "data": [{"id": name} for name in mine.models]})

            def do_POST(self):
                assert self.path == "/v1/chat/completions"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with mine.lock:
                    mine.asked.append(request)
                    mine.headers.append(self.headers)
                    mine.at_work += 1
                    mine.most_at_work = max(mine.most_at_work, mine.at_work)
                    status = mine.refuse.pop() if mine.refuse else 200
                time.sleep(mine.slow)
                self.answer(status, mine.say(request) if status == 200 else {"error": {"message": "busy"}})
                with mine.lock:
                    mine.at_work -= 1

            def answer(self, status, content):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
            server.shutdown()


def redness(request):
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))[..., 0].mean() / 255


def question(request):
    return request["messages"][0]["content"][1]["text"]


def by_redness(request):
    """Three ways to say yes, one to say no, and something else."""
    yes = redness(request)
    shares = {"Yes": 0.5 * yes, " yes": 0.3 * yes, "YES": 0.1 * yes, "No": 0.9 * (1 - yes), "Maybe": 0.1}
    top = [{"token": word, "logprob": math.log(max(p, 1e-30))} for word, p in shares.items()]
    first = {"token": "Yes", "logprob": top[0]["logprob"], "top_logprobs": top}
    return {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [first]}}]}


def says(text):
    return lambda request: {"choices": [{"message": {"content": text}, "logprobs": None}]}


def pictures():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)
    images[0, ..., 0], images[1, ..., 0] = 255, 51
    return images


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def test_the_score_is_the_probability_of_yes(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "secret")
    server, images = Speaks(), pictures()
    with server.running() as url:
        rewards = Rewards({"vlm": {"url": url, "model": "looks", "token_env": "A_TOKEN"}})
        found = rewards.score(images, METADATA)["vlm"]
    assert found == pytest.approx(images[..., 0].mean(axis=(1, 2)) / 255, abs=1e-9)
    assert found[0] == pytest.approx(1.0) and found[1] == pytest.approx(0.2)
    request = server.asked[0]
    assert question(request) == 'Does this picture show "a red square"? Answer yes or no.'
    assert (request["model"], request["logprobs"], request["max_tokens"]) == ("looks", True, 1)
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "said, expected",
    [
        ("7", 0.7),
        ("Score: 8.5/10", 0.85),
        ("**0**", 0.0),
        ("10", 1.0),
        ("I say 3.", 0.3),
        (".8", 0.08),
        ("Well...8", 0.8),
    ],
)
def test_the_score_is_a_number_of_the_answer(said, expected):
    with Speaks(says(said)).running() as url:
        vlm = VLM(url, "looks", "Is it a good {noun}, {prompt}, {{prompt}}?", answer="number")
        assert vlm.score(pictures(), ["x"] * 3, METADATA) == pytest.approx([expected] * 3)


def test_the_question_takes_what_the_metadata_has_and_no_more():
    server = Speaks(says("5"))
    with server.running() as url:
        vlm = VLM(url, "looks", "{noun}: {prompt}", answer="number")
        vlm.check(METADATA)
        vlm.score(pictures()[:1], ["{noun} of gold"], METADATA[:1])
        with pytest.raises(UserError, match=r"\{noun\} is not in the metadata of 'p' .known: prompt.$"):
            vlm.check([{"prompt": "p"}])
    assert question(server.asked[0]) == "square: {noun} of gold"


def test_each_picture_is_asked_about_once_and_several_at_a_time():
    server, images = Speaks(slow=0.05), pictures()
    with server.running() as url:
        vlm = VLM(url, "looks", at_once=3)
        first = vlm.score(images, ["a"] * 3, METADATA)
        assert vlm.score(images[::-1], ["a"] * 3, METADATA) == first[::-1]
        assert len(server.asked) == 3 and server.most_at_work > 1
        vlm.score(images, ["b"] * 3, METADATA)
    assert len(server.asked) == 6


def test_a_busy_server_is_asked_again():
    server = Speaks(refuse=[429, 500, 503])
    with server.running() as url:
        found = VLM(url, "looks", at_once=1).score(pictures(), ["a"] * 3, METADATA)
    assert len(found) == 3 and len(server.asked) == 6


@pytest.mark.parametrize(
    "say, settings, words",
    [
        (says("Yes"), {}, "gives no log-probabilities.*expected answer: number"),
        (says("a lot"), {"answer": "number"}, "expected a number from 0 to 10, got 'a lot'"),
        (says("11"), {"answer": "number"}, "expected a number from 0 to 10, got '11'"),
        (says(None), {"answer": "number"}, "expected a chat completion"),
        (lambda request: {"choices": []}, {}, "expected a chat completion"),
        (lambda request: ["hello"], {}, "expected a chat completion"),
        (lambda request: {"choices": [{"message": {"content": "Perhaps"}, "logprobs": {"content": [
            {"top_logprobs": [{"token": "Perhaps", "logprob": 0.0}]}]}}]}, {},
         "expected an answer of yes or no, got 'Perhaps'"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error_of_one_line(say, settings, words):
    with Speaks(say).running() as url:
        with pytest.raises(UserError, match=f"^reward vlm: {url}: {words}") as error:
            VLM(url, "looks", retries=0, **settings).score(pictures(), ["a"] * 3, METADATA)
        assert "\n" not in str(error.value)


def odd_one(request):
    """Of the reddest picture nothing is said."""
    return says("I cannot tell." if redness(request) == 1 else "5")(request)


@pytest.mark.parametrize("say, refuse", [(odd_one, []), (says("5"), [400]), (says("5"), [403])])
def test_pictures_without_an_answer_are_not_scored(say, refuse, caplog):
    """Once the server has answered: before, nothing says that it would answer others."""
    server, images = Speaks(say), pictures()
    with server.running() as url:
        vlm = VLM(url, "looks", answer="number", at_once=1)
        server.refuse = list(refuse)
        with pytest.raises(UserError, match=f"^reward vlm: {url}: (expected a number|refused with)"):
            vlm.score(images[:1], ["a"], METADATA[:1])
        assert not caplog.messages
        server.refuse = list(refuse)
        assert vlm.score(images, ["a"] * 3, METADATA) == [None, 0.5, 0.5]
        server.refuse = list(refuse)
        assert vlm.score(images[:1], ["b"], METADATA[:1]) == [None]
    assert len(caplog.messages) == 1 and "without an answer are not scored: reward vlm" in caplog.text


def test_a_server_that_answers_for_none_any_more_is_an_error():
    """A key that was used up, or another model: a run would go on without its reward."""
    server, images = Speaks(says("5")), pictures()
    with server.running() as url:
        vlm = VLM(url, "looks", answer="number", at_once=1, retries=0)
        vlm.score(images, ["a"] * 3, METADATA)
        server.refuse = [403] * 2 * MOST_UNANSWERED
        with pytest.raises(UserError, match="refused with 403"):
            for i in range(MOST_UNANSWERED // 3 + 1):
                assert vlm.score(images, [str(i)] * 3, METADATA) == [None] * 3
        assert i == MOST_UNANSWERED // 3


def test_a_server_that_is_gone_is_an_error_for_all():
    server = Speaks(says("5"), refuse=[404])
    with server.running() as url, pytest.raises(UserError, match=r"refused with 404 busy$"):
        VLM(url, "looks", answer="number", at_once=1).score(pictures(), ["a"] * 3, METADATA)


def test_what_the_server_refuses_is_said_in_its_words():
    with Speaks(refuse=[400] * 9).running() as url:
        with pytest.raises(UserError, match=r"refused with 400 busy$"):
            VLM(url, "looks", at_once=1).score(pictures(), ["a"] * 3, METADATA)
        with pytest.raises(UserError, match=r"has no model 'other', expected one of looks$"):
            VLM(url, "other").setup("cpu")
    with pytest.raises(UserError, match="cannot be reached"):
        VLM(url, "looks", retries=0).setup("cpu")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"url": "127.0.0.1:80"}, "url: expected http://"),
        ({"answer": "text"}, "answer: expected probability or number, got 'text'"),
        ({"range": [5, 5]}, r"range: expected the lower number first, got \[5, 5\]"),
        ({"at_once": 0}, "at_once: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(UserError, match=words):
        Rewards({"vlm": {"url": "http://127.0.0.1:1/v1", "model": "looks"} | settings})


@pytest.mark.parametrize("host, wanted", [("127.0.0.1", []), ("vlm.example", ["vlm"])])
def test_a_loaded_recipe_sends_pictures_elsewhere_only_with_consent(host, wanted):
    rewards = f"rewards={{vlm: {{url: 'http://{host}:8000/v1', model: looks}}}}"
    assert needs_consent(load_recipe("builtin", [rewards])) == wanted
