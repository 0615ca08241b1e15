"""Rewards at work beside the rollout: a thread for each, results in order, a clear end where one fails.

A reward is called with one prompt's samples at a time, whatever the rollout's micro-batch is and whether or
not anything is generated meanwhile, so that what it returns does not depend on the overlap. Its own calls
never overlap each other, unless it has workers; those of different rewards do. Threads overlap what leaves
Python's lock alone: onnxruntime, torch, waiting for a server. A slow reward in pure Python wants `workers`.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import numbers
import queue
import reprlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from crd_fast.errors import UserError
from crd_fast.out_of_memory import as_out_of_memory
from crd_fast.rewards.failures import RewardFailed, failure, is_remote, what
from crd_fast.rewards.lent import lent_images, lent_metadata
from crd_fast.rewards.torch_state import TorchState

MAX_WAITING = 16  # calls of one reward that may wait before the rollout has to
TIMEOUT = 600.0  # seconds for one call, where the recipe does not say
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before a retry, doubled each time
RETRIES = 2  # of a call, where the recipe does not say
WITHOUT_MEMORY = 5  # tries while nothing is generated, after which there is too little for the reward itself

logger = logging.getLogger("crd_fast")


@dataclass(frozen=True)
class Reward:
    """What is called, and what is done when it fails. `score(images, prompts, metadata)`, one value an image,
    None for one that it does not score.

    timeout: seconds for one call. retries: how often a call is repeated that raises ConnectionError,
    TimeoutError, or what else `is_remote`; other exceptions end the run at once, but for memory that
    the rollout has taken. workers: how many
    calls may be at work at once, in processes that `score` ends itself where they take too long; 0: none are.
    fits: whether it scores pictures of a prompt with its metadata at all; it is not asked for others.
    """

    name: str
    score: Callable
    timeout: float = TIMEOUT
    retries: int = RETRIES
    workers: int = 0
    fits: Callable[[dict], bool] | None = None

    def values(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        """Float64 (N,), NaN where it does not score."""
        rows = self.fitting(metadata).nonzero()[0]
        found = np.full(len(images), np.nan)
        if len(rows):
            entries = lent_metadata([metadata[i] for i in rows])
            with torch.no_grad():
                values = self.score(lent_images(images, rows), [prompts[i] for i in rows], entries)
                found[rows] = checked(self.name, values, len(rows))  # here: it may be a generator
        return found

    def fitting(self, metadata: list[dict]) -> np.ndarray:
        """Which prompts it scores, bool (N,)."""
        return np.array([self.fits is None or self.fits(entry) for entry in metadata])


@dataclass
class _Call:
    arguments: tuple
    deadline: float = math.inf
    started: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    values: np.ndarray | None = None
    error: BaseException | None = None


class Scoring:
    """Puts images through all rewards; a context, at whose end the threads end.

    Every method raises UserError as soon as a call is known to have failed or to take longer than its
    timeout. A thread that hangs is left behind; it does not keep the process from ending.
    """

    def __init__(self, rewards: list[Reward]):
        waited_for = threading.Event()
        self._lanes = [_Lane(reward, waited_for) for reward in rewards]

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_) -> None:
        for lane in self._lanes:
            lane.end()

    def put(self, images: np.ndarray, metadata: list[dict]) -> None:
        """One call of every reward. Waits where a reward is too far behind. images: uint8 (N, H, W, 3)."""
        prompts = [entry["prompt"] for entry in metadata]
        for lane in self._lanes:
            lane.put(images, prompts, metadata)

    def results(self) -> dict[str, np.ndarray]:
        """Each reward's values of everything that was put, float64, in the order of `put`; NaN: unscored."""
        for lane in self._lanes:
            while lane.waiting:
                lane.take()
        return {lane.reward.name: np.concatenate(lane.values) for lane in self._lanes}


class PromptScoring:
    """Scores each prompt's samples as soon as the rollout has all of them.

    decode: latents to images (N, H, W, 3), uint8. metadata: of each prompt; samples: K, latents come prompt
    by prompt.
    """

    def __init__(self, scoring: Scoring, decode: Callable, metadata: list[dict], samples: int):
        self.scoring, self.decode, self.metadata, self.samples = scoring, decode, metadata, samples
        self.put = 0  # prompts so far

    def __call__(self, latents: torch.Tensor) -> None:
        """latents: all that are finished so far, the first ones first."""
        while (self.put + 1) * self.samples <= len(latents):
            chosen = latents[self.put * self.samples : (self.put + 1) * self.samples]
            self.scoring.put(self.decode(chosen), [self.metadata[self.put]] * self.samples)
            self.put += 1


class _Lane:
    """One reward's threads, one for each worker, the calls that wait for them, and the values so far.

    waited_for: set while the thread that generates does nothing but wait for some reward.
    """

    def __init__(self, reward: Reward, waited_for: threading.Event):
        self.reward, self._waited_for = reward, waited_for
        self.waiting: deque[_Call] = deque()
        self.values: list[np.ndarray] = []
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._ended = self._warned = False
        self._state = TorchState()  # here: once several rewards are at work, it may be another one's
        # which GPU is current is a thread's own matter, and the first one's where nothing is said
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._threads = max(reward.workers, 1)
        self._most = max(MAX_WAITING, 2 * reward.workers)
        for _ in range(self._threads):
            # a daemon: a reward that hangs must not keep the process alive
            threading.Thread(target=self._work, name=f"reward {reward.name}", daemon=True).start()

    def put(self, *arguments) -> None:
        while self.waiting and (len(self.waiting) >= self._most or self.waiting[0].done.is_set()):
            self.take()
        call = _Call(arguments)
        self.waiting.append(call)
        self._calls.put(call)

    def take(self) -> None:
        """Waits for the oldest call."""
        call = self.waiting.popleft()
        if not call.done.is_set():
            self._waited_for.set()
        try:
            self._wait(call)
        finally:
            self._waited_for.clear()
        if call.error is not None:
            raise call.error
        assert call.values is not None
        self.values.append(call.values)

    def _wait(self, call: _Call) -> None:
        call.started.wait()  # the calls before it are done
        # the deadline moves with every retry, so it is looked at again each second
        while not call.done.wait(min(1.0, max(0.0, call.deadline - time.monotonic()))):
            if time.monotonic() >= call.deadline:
                raise UserError(
                    f"reward {self.reward.name}: expected values within {self.reward.timeout:g} s, got none"
                )

    def end(self) -> None:
        """A thread ends after the call that it is at; the ones that wait are dropped."""
        self._ended = True
        for _ in range(self._threads):
            self._calls.put(None)

    def _work(self) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        while (call := self._calls.get()) is not None and not self._ended:
            try:
                call.values = self._call(call)
            except BaseException as error:  # it is raised again where the values are wanted
                call.error = error
            call.done.set()
            if call.error is not None:
                return

    def _call(self, call: _Call) -> np.ndarray:
        reward = self.reward

        def waits(seconds: float) -> None:
            call.deadline = math.inf
            time.sleep(seconds)

        try:
            return repeated(lambda: self._values(call), reward.retries, waits)
        except UserError:
            raise
        except BaseException as error:  # whatever it is, the reward raised it: signals come elsewhere
            if not is_remote(error):
                raise UserError(failure(reward.name, error)) from error
            tried = f", {reward.retries} retries" if reward.retries else ""
            raise UserError(f"reward {reward.name}: {what(error)}{tried}") from error

    def _values(self, call: _Call) -> np.ndarray:
        """The reward's, asked again where it finds no memory.

        What is generated meanwhile, in micro-batches as large as fit, may take all there is. It gives way at
        the latest when it waits for the rewards.
        """
        reward, pause, tries = self.reward, FIRST_PAUSE, 0
        while True:
            alone = self._waited_for.is_set()
            call.deadline = math.inf if reward.workers else time.monotonic() + reward.timeout
            call.started.set()
            try:
                with as_out_of_memory():
                    return reward.values(*call.arguments)
            except torch.OutOfMemoryError:
                tries += alone
                if tries == WITHOUT_MEMORY or self._ended:
                    raise
                call.deadline = math.inf
            finally:
                self._state.put_back()
            # here, where the error no longer holds what the failed call computed
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not self._warned:
                logger.warning("warning: reward %s: out of memory, it is asked again", reward.name)
                self._warned = True
            time.sleep(pause) if alone else self._waited_for.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def repeated(call: Callable[[], np.ndarray], retries: int, waits: Callable[[float], None]) -> np.ndarray:
    """What it returns, asked again so often where it raises what `is_remote`, after 0.5, 1, 2, ... 8 s."""
    pause = FIRST_PAUSE
    for retries_left in reversed(range(retries + 1)):
        try:
            return call()
        except BaseException as error:
            if not retries_left or not is_remote(error):
                raise
        waits(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    raise AssertionError


def checked(name: str, values, count: int) -> np.ndarray:
    """Values as float64 (count,), NaN for None. Raises RewardFailed for a wrong number, a NaN or none at all.

    Of what may have no end, no more is taken than tells that it is too long.
    """
    if isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], dict):
        raise RewardFailed(f"reward {name}: expected {count} values alone, got a pair of them and a dict")
    if isinstance(values, (Mapping, set, frozenset)):  # of keys, or in no order
        raise RewardFailed(f"reward {name}: expected {count} values in a row, got {type(values).__name__}")
    endless = not hasattr(values, "__len__")
    try:
        each = iter(values)
    except TypeError:
        raise RewardFailed(f"reward {name}: expected {count} values, got {type(values).__name__}") from None
    values = list(itertools.islice(each, count + 1) if endless else each)
    if len(values) != count:
        more = " or more" * (endless and len(values) > count)
        raise RewardFailed(f"reward {name}: expected {count} values, got {len(values)}{more}")
    return np.array([_number(name, i, value) for i, value in enumerate(values)])


def checked_metrics(name: str, reported: Mapping) -> dict[str, float]:
    """What a reward reports, as floats, without what is NaN, infinite or None. UserError for no number."""
    found = {}
    for key, value in reported.items():
        try:
            number = value.item() if hasattr(value, "item") else value
        except (ValueError, RuntimeError):  # of an array, or a tensor, with several
            number = value
        if number is not None and not isinstance(number, numbers.Real):
            got = reprlib.repr(value)
            raise UserError(f"reward {name}: {key} of its report: expected a number, got {got}")
        if number is not None and math.isfinite(number):
            found[str(key)] = float(number)
    return found


def with_none(values: np.ndarray) -> list[float | None]:
    """What `checked` was given: None where an image was not scored."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _number(name: str, i: int, value) -> float:
    if value is None:
        return math.nan
    try:
        if value is not np.ma.masked:  # whose item is 0
            value = value.item() if hasattr(value, "item") else value
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # several in one, none after all, too large
        pass
    raise RewardFailed(f"reward {name}: expected finite numbers, got {reprlib.repr(value)} for image {i}")
