"""A reward behind HTTP, so that one with awkward dependencies lives in an environment or machine of its own.

    POST /score    {"images": [PNG in base64, ...], "prompts": [...], "metadata": [{...}, ...]}
                   -> {"scores": [...], "reward": NAME}, a number for each image, or null: not scored
    POST /check    {"metadata": [{"prompt": ...}, ...]} -> {}, or why one of them cannot be scored
    GET  /ready    {"reward": NAME} once it is loaded, 503 while a call takes longer than its `timeout`
    GET  /health   200 as long as the process is up

With a token every request but /health carries `Authorization: Bearer TOKEN`; without one the Host header must
name this machine, or a web page could ask by way of a browser. What is wrong is answered with 4xx and
{"detail": one line}; a full queue and a reward that hangs with 503 and Retry-After; a reward that fails with
500. All images of a request have one size. Only PNG and JSON are decoded, in the thread that also scores.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from crd_fast.errors import UserError
from crd_fast.rewards.bodies import LIMITS, PNG_START, Limits, Refused, dicts_of, fields_of, parse_score
from crd_fast.rewards.connections import MAX_CONNECTIONS, Connection, bind
from crd_fast.rewards.engine_settings import OPTIONAL, SKIP
from crd_fast.rewards.failures import RewardFailed, failure, refusals_of
from crd_fast.rewards.foreign import host_of, is_loopback
from crd_fast.rewards.registry import default_device, load
from crd_fast.rewards.scoring import RETRIES, TIMEOUT, checked, repeated, with_none
from crd_fast.rewards.workers import Workers

SLOWEST, GRACE = 2**15, 10.0  # bytes a second of a body on average, after so many seconds
POLL = 1.0  # seconds between looks at whether the client is still there
log = logging.getLogger(__name__)
__all__ = [
    "PNG_START",
    "Limits",
    "Refused",
    "Worker",
    "bind",
    "make_app",
    "make_server",
    "parse_score",
    "serve",
]


class Worker:
    """The reward and the one thread that loads it and scores with it, or one for each of its `workers`."""

    def __init__(self, name: str, settings: Mapping | None = None, device: str | None = None):
        self.name = name
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"reward {name}")
        self._workers: Workers | None = None
        self._timeout, self._retries = TIMEOUT, RETRIES
        self._began: dict[int, float] = {}  # when a thread's present call did
        self.loaded = self.thread.submit(self._load, settings, device)

    def _load(self, settings: Mapping | None, device: str | None):
        reward, engine = load(self.name, settings)
        for key in (SKIP, OPTIONAL):
            if engine.get(key):
                raise UserError(f"reward {self.name}: {key}: expected in the recipe that asks the server")
        self._retries = engine.get("retries", RETRIES)
        self._workers = reward if isinstance(reward, Workers) else None
        # workers that hang are ended and started again, a thread cannot be
        self._timeout = math.inf if self._workers else engine.get("timeout", TIMEOUT)
        if hasattr(reward, "setup"):
            reward.setup(device or default_device())
        if "workers" in engine:
            self.thread.shutdown(wait=False)
            self.thread = ThreadPoolExecutor(engine["workers"], thread_name_prefix=f"reward {self.name}")
        return reward

    def end(self) -> None:
        """Nothing that waits is scored any more; what is being scored in workers ends."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self._workers is not None:
            self._workers.close()

    @property
    def ready(self) -> bool:
        return self.loaded.done() and self.loaded.exception() is None

    @property
    def stuck(self) -> bool:
        """Whether a call takes longer than the reward's `timeout`."""
        now = time.monotonic()
        return any(now - began > self._timeout for began in list(self._began.values()))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._began[threading.get_ident()] = time.monotonic()
        try:
            yield
        finally:
            del self._began[threading.get_ident()]

    def answer(self, work: str, body: bytes, limits: Limits) -> tuple[int, dict]:
        """HTTP status and content: what `score` or `check` gives, or why not.

        An exception would carry the whole request, in the frames of its traceback, for as long as anything
        knows it: nothing is raised out of the thread.
        """
        try:
            with self._at_work():
                return 200, getattr(self, work)(body, limits)
        except Refused as refused:
            return refused.status, {"detail": refused.detail}

    def score(self, body: bytes, limits: Limits) -> dict:
        images, prompts, metadata = parse_score(body, limits)
        reward = self.loaded.result()
        self._check(reward, metadata)
        with self._refusing(), torch.no_grad():
            scores = with_none(self._values(reward, images, prompts, metadata))
            return {"scores": scores, "reward": self.name}

    def _values(self, reward, *arguments) -> np.ndarray:
        """Asked again where what it asks itself cannot be reached; the pauses are no part of a call."""

        def call() -> np.ndarray:
            self._began[threading.get_ident()] = time.monotonic()
            return checked(self.name, getattr(reward, "score", reward)(*arguments), len(arguments[0]))

        def waits(seconds: float) -> None:
            self._began[threading.get_ident()] = math.inf
            time.sleep(seconds)

        return repeated(call, self._retries, waits)

    def check(self, body: bytes, limits: Limits) -> dict:
        metadata = dicts_of(fields_of(body, "metadata")["metadata"])
        if not all(isinstance(entry.get("prompt"), str) for entry in metadata):
            raise Refused(400, "metadata: expected a `prompt` in every entry")
        self._check(self.loaded.result(), metadata)
        return {}

    def _check(self, reward, metadata: list[dict]) -> None:
        if hasattr(reward, "check"):
            with self._refusing(), refusals_of(self.name, where=False):
                reward.check(metadata)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Raises Refused, whatever the reward's code raises: 422 for our own errors, 500 for others.

        Without the place in the reward's file, which is nothing that a client should know.
        """
        try:
            yield
        except RewardFailed as error:
            log.error("%s", error)
            raise Refused(500, str(error)) from None
        except UserError as error:
            raise Refused(422, str(error)) from None
        except BaseException as error:  # signals come elsewhere
            log.exception("reward %s failed", self.name)
            raise Refused(500, failure(self.name, error, where=False)) from None


def make_app(worker: Worker, token: str | None = None, limits: Limits = LIMITS) -> FastAPI:
    """The server's application. Its state is a count of requests; the work is the worker's."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    held = 0  # requests that are read, wait or are scored; only the event loop's thread counts

    def addressed(request: Request) -> None:
        if token is None and not is_loopback(host_of(f"//{request.headers.get('host', '')}")):
            raise HTTPException(421, "expected this machine's own name in Host, or a token")

    def authorise(request: Request) -> None:
        addressed(request)
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "expected the token as `Authorization: Bearer TOKEN`")

    def loaded() -> None:
        if not worker.ready:
            raise HTTPException(503, "the reward is being loaded", headers={"Retry-After": "2"})
        if worker.stuck:
            raise hangs()

    def hangs() -> HTTPException:
        return HTTPException(503, "the reward hangs in a call", headers={"Retry-After": "10"})

    @contextmanager
    def place():
        nonlocal held
        if held >= limits.requests:
            raise HTTPException(503, "too many requests at once", headers={"Retry-After": "1"})
        held += 1
        try:
            yield
        finally:
            held -= 1

    async def answer(request: Request, work: str) -> JSONResponse:
        authorise(request)
        loaded()
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "expected Content-Type: application/json")
        with place():
            try:
                body = await _read(request, limits)
            except ClientDisconnect:
                raise HTTPException(400, "the body ended early") from None
            run = asyncio.get_running_loop().run_in_executor
            future = run(worker.thread, worker.answer, work, body, limits)
            del body
            try:
                while not (await asyncio.wait({future}, timeout=POLL))[0]:
                    if await request.is_disconnected():
                        future.cancel()  # nobody waits for it; if it is being scored already, it goes on
                        raise HTTPException(400, "the client has gone")
                    if worker.stuck:
                        future.cancel()
                        raise hangs()
            except asyncio.CancelledError:  # by uvicorn, which has waited for it
                raise HTTPException(
                    503, "the server is being stopped", headers={"Retry-After": "2"}
                ) from None
            status, content = future.result()
            return JSONResponse(content, status)

    @app.get("/health")
    async def health(request: Request) -> dict:
        addressed(request)
        return {"reward": worker.name}

    @app.get("/ready")
    async def ready(request: Request) -> dict:
        authorise(request)
        loaded()
        return {"reward": worker.name}

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        return await answer(request, "score")

    @app.post("/check")
    async def check(request: Request) -> JSONResponse:
        return await answer(request, "check")

    return app


async def _read(request: Request, limits: Limits) -> bytes:
    """The body. One that is too long is dropped as it comes, or the client would not see the answer."""
    chunks, length = [], 0
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(min(limits.seconds, GRACE)) as deadline:
            async for chunk in request.stream():
                length += len(chunk)
                if length <= limits.bytes:
                    chunks.append(chunk)
                elif length > 8 * limits.bytes:
                    break
                else:
                    chunks.clear()
                deadline.reschedule(began + min(limits.seconds, GRACE + length / SLOWEST))
    except TimeoutError:
        raise HTTPException(
            408, f"expected the body within {limits.seconds:g} s, {SLOWEST} bytes a second or more"
        ) from None
    if length > limits.bytes:
        raise HTTPException(413, f"expected at most {limits.bytes} bytes")
    return b"".join(chunks)


def serve(worker: Worker, listening: socket.socket, token: str | None, limits: Limits = LIMITS) -> None:
    """Answers until it is stopped. Raises what loading the reward raised."""
    server = make_server(worker, token, limits)
    worker.loaded.add_done_callback(lambda loaded: setattr(server, "should_exit", bool(loaded.exception())))
    try:
        server.run(sockets=[listening])
    finally:
        worker.end()
    if worker.loaded.done() and not worker.loaded.cancelled():
        worker.loaded.result()


def make_server(worker: Worker, token: str | None, limits: Limits) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            make_app(worker, token, limits),
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS + 1,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=10,
        )
    )
