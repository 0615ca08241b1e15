"""The reward that asks a server, `crd-fast serve-reward NAME` or anything that answers as it does.

    rewards: {http: {weight: 1.0, url: "http://127.0.0.1:8701", token_env: REWARD_TOKEN}}

See `crd_fast.rewards.server` for what is sent. Proxies and .netrc of the environment are not used.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import urllib3
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.rewards.deadlines import Deadline, pool_of
from crd_fast.rewards.failures import RewardFailed
from crd_fast.rewards.scoring import checked, with_none

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before a retry, doubled each time
TRY_AGAIN = (429, 502, 503, 504)  # busy, being loaded, or a proxy's word that it is either or not there
OF_ONE = (400, 403, 413, 422, 451)  # what is refused may be this request alone, by a filter of content
REFUSED = 422  # what the server's reward does not score; the other statuses are a server's own trouble
MAX_ANSWER = 2**20  # bytes
CHECKED_AT_ONCE = 256  # prompts


class NoAnswer(UserError):
    """The server is there and has no answer to this request; it may have one to others."""


class JsonClient:
    """Asks a server for JSON.

    name: of the reward that asks, in messages. url: of the server, without a path's last part. token_env:
    name of the environment variable that holds the token. timeout: seconds for one answer. retries: how
    often a request is repeated that got no connection, no answer in time, or one of the statuses
    `try_again`, after 0.5, 1, 2, ... 10 s or as long as the server says.

    of_one: the statuses by which it refuses what it was asked and may answer others.

    Every method raises RewardFailed, one line, for a server that is down, slow, refuses or answers nonsense;
    NoAnswer where it refuses with one of the statuses `of_one`.
    """

    def __init__(
        self,
        name: str,
        url: str,
        token_env: str | None,
        timeout: float,
        retries: int,
        try_again: Collection[int] = TRY_AGAIN,
        of_one: Collection[int] = OF_ONE,
    ):
        parts = urlsplit(str(url))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"reward {name}: url: expected http://HOST:PORT, got {url!r}")
        if not timeout > 0 or retries < 0:
            raise UserError(f"reward {name}: expected timeout > 0 and retries >= 0, got {timeout}, {retries}")
        self.name, self.url, self.timeout, self.retries = name, str(url).rstrip("/"), timeout, retries
        self.try_again, self.of_one = try_again, of_one
        self.headers = {"Accept-Encoding": "identity"}
        if token_env is not None:
            self.headers["Authorization"] = f"Bearer {token_from(token_env)}"
        self._pool, self._path = pool_of(self.url, 8), urlsplit(self.url).path

    def ask(self, method: str, path: str, content: dict | None = None) -> Any:
        """The answer's JSON, after as many tries as it takes and the settings allow."""
        try:
            body = None if content is None else json.dumps(content, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            problem = f"metadata: expected what JSON can hold: {error}"
            raise RewardFailed(f"reward {self.name}: {problem}") from None
        pause = FIRST_PAUSE
        for tries_left in reversed(range(self.retries + 1)):
            wait = pause * random.SystemRandom().uniform(0.5, 1.0)  # clients that were turned away spread out
            try:
                status, headers, answer = self._once(method, path, body)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                problem = self._problem(error)
            else:
                if status not in self.try_again:
                    return self._answered(status, answer)
                problem = f"answered {status} {_detail(answer)}".rstrip()
                if (headers.get("Retry-After") or "").isdecimal():
                    wait += min(float(headers["Retry-After"]), LONGEST_PAUSE)
            if not tries_left:
                tried = f" (tried {self.retries + 1} times)" if self.retries else ""
                raise self.error(f"{problem}{tried}")
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError

    def error(self, problem: str, kind: type[UserError] = RewardFailed) -> UserError:
        return kind(f"reward {self.name}: {self.url}: {problem}")

    def _problem(self, error: Exception) -> str:
        late = isinstance(error, (urllib3.exceptions.TimeoutError, TimeoutError))
        if late and not isinstance(error, urllib3.exceptions.NewConnectionError):
            return f"expected an answer within {self.timeout:g} s, got none"
        reached = isinstance(error, urllib3.exceptions.HTTPError) and not isinstance(
            error, urllib3.exceptions.NewConnectionError
        )
        return f"{'gave no whole answer' if reached else 'cannot be reached'} ({_cause(error)})"

    def _answered(self, status: int, answer: bytes) -> Any:
        if status != 200:
            kind = NoAnswer if status in self.of_one else RewardFailed
            raise self.error(f"refused with {status} {_detail(answer)}".rstrip(), kind)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            got = shortened(answer.decode("utf-8", "replace"))
            raise self.error(f"expected JSON, got {got!r}") from None

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """One request: status, headers and at most MAX_ANSWER bytes, all within the timeout."""
        headers = self.headers | ({"Content-Type": "application/json"} if body is not None else {})
        deadline = Deadline(self.timeout)
        try:
            with deadline:
                response = self._pool.request(
                    method,
                    self._path + path,
                    body=body,
                    headers=headers,
                    timeout=self.timeout,
                    retries=False,
                    redirect=False,
                    preload_content=False,
                )
                return response.status, response.headers, self._read(response, deadline)
        except (urllib3.exceptions.HTTPError, OSError):
            if deadline.passed:  # whatever the end of the connection was taken for
                raise TimeoutError from None
            raise

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: Deadline) -> bytes:
        answer = b""
        try:
            while chunk := response.read1(65536):
                answer += chunk
                if len(answer) > MAX_ANSWER:
                    raise self.error(f"expected at most {MAX_ANSWER} bytes, got more")
            if not deadline.met():
                raise TimeoutError
        except BaseException:
            response.close()  # what is left unread must not be taken for the next answer
            raise
        response.release_conn()
        return answer


class HttpReward:
    """Scores on a server.

    url, token_env, timeout, retries: see `JsonClient`; statuses 429 and 502 to 504 are tried again. batch:
    images a request; at least `rollout.samples_per_prompt` where the server's reward compares a prompt's
    pictures.

    served: what the server calls its reward, without a file's folders; None before `setup`, and where it does
    not say. A run goes on with no other.
    """

    served: str | None = None

    def __init__(
        self,
        url: str,
        token_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 8,
        batch: int = 16,
    ):
        if batch < 1:
            raise UserError(f"reward http: batch: expected at least 1, got {batch}")
        self.client = JsonClient("http", url, token_env, timeout, retries, of_one=(REFUSED,))
        self.batch = batch

    def setup(self, device: str) -> None:
        """Waits until the server is ready, as long as the retries last."""
        self._heard(self.client.ask("GET", "/ready"))

    def check(self, metadata: list[dict]) -> None:
        for start in range(0, len(metadata), CHECKED_AT_ONCE):
            self.client.ask("POST", "/check", {"metadata": metadata[start : start + CHECKED_AT_ONCE]})

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float | None]:
        scores: list[float | None] = []
        for part in batches(prompts, self.batch):
            answer = self.client.ask(
                "POST",
                "/score",
                {
                    "images": [encode(image) for image in images[part]],
                    "prompts": list(prompts[part]),
                    "metadata": list(metadata[part]),
                },
            )
            scores += self._scores(answer, len(images[part]))
        return scores

    def _heard(self, answer: Any) -> None:
        """Raises RewardFailed where another reward has come to answer at the address."""
        name = answer.get("reward") if isinstance(answer, dict) else None
        if not isinstance(name, str):
            return
        name = name.rpartition("/")[2]
        if self.served not in (None, name):
            raise self.client.error(f"expected scores of the server's reward {self.served}, got {name}")
        self.served = name

    def _scores(self, answer: Any, count: int) -> list[float | None]:
        self._heard(answer)
        if not isinstance(answer, dict) or "scores" not in answer:
            wanted = f'{{"scores": [{count} numbers or null]}}'
            raise self.client.error(f"expected {wanted}, got {shortened(json.dumps(answer))}")
        return with_none(checked(f"http: {self.client.url}", answer["scores"], count))


def batches(prompts: Sequence[str], size: int) -> Iterator[slice]:
    """Parts of at most `size`, which end where a prompt's pictures do wherever those do not exceed a part.

    So that a reward which compares them has all of them.
    """
    first = last = 0
    for _, group in itertools.groupby(prompts):
        end = last + len(list(group))
        if end - first > size:
            if last > first:
                yield slice(first, last)
            first = last
            while end - first > size:
                yield slice(first, first + size)
                first += size
        last = end
    if last > first:
        yield slice(first, last)


def token_from(variable: str) -> str:
    """The token in an environment variable. Raises UserError where there is none that HTTP can carry."""
    token = os.environ.get(variable, "")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"token_env: expected {variable} in the environment, printable ASCII without spaces")
    return token


def encode(image: np.ndarray) -> str:
    """One image, uint8 (height, width, 3), as PNG in base64."""
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _detail(answer: bytes) -> str:
    """What the server says is wrong: `detail` as ours has it, or `error.message` as OpenAI's does."""
    try:
        found = json.loads(answer)
        detail = found["detail"] if "detail" in found else found["error"]["message"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return shortened(detail if isinstance(detail, str) else json.dumps(detail))


def _cause(error: BaseException) -> str:
    """The innermost reason, such as `Connection refused`; the outer ones name addresses and objects."""
    while True:
        inner = error.__cause__ or error.__context__ or getattr(error, "reason", None)
        inner = inner or next((part for part in error.args if isinstance(part, BaseException)), None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return getattr(error, "strerror", None) or type(error).__name__


def shortened(text: str, length: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
