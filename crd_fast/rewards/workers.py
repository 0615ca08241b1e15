"""A reward in processes of its own: `rewards: {ocr: {workers: 4}}`, or `auto`, the cores but one.

For what holds Python's lock or may take the process with it. A call is what it is without workers, one
prompt's samples or the part of an evaluation, so that values are the same; several calls are at work at once.
Pictures travel in shared memory. A worker that dies or gives no answer within `timeout` is ended and started
again, and its call repeated once. Workers are in process groups of their own, which end with this process
however it ends, and do not get its Ctrl-C.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection, resource_tracker, util
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crd_fast.errors import MissingPackage, UserError, reason_of
from crd_fast.launched import processes_here
from crd_fast.out_of_memory import as_out_of_memory
from crd_fast.rewards.failures import RewardFailed, answers_for, failure, is_remote, refusals_of
from crd_fast.rewards.lent import read_only
from crd_fast.rewards.scoring import checked, with_none

LOADING = 600.0  # seconds, at least, for a worker to load its reward, check all prompts or report
LOOK = 1.0  # seconds between looks at whether a worker that does not answer is still there
METHODS = ("check", "report")  # that a reward may have
SHARED = Path("/dev/shm")
SENT = (MissingPackage, RewardFailed, UserError)  # the kinds that are told apart
TRIED_AGAIN = (TimeoutError, ConnectionError, torch.OutOfMemoryError)  # by who scores
log = logging.getLogger(__name__)


class _Lost(Exception):
    """A worker has ended or does not answer: what is to be said of it."""


def cores() -> int:
    """Processors that this process may use, of several on one machine its share."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // processes_here())


class Workers:
    """The reward `name` in `count` processes, called as the reward itself, from as many threads at once.

    reward: a name, or a function, class or object that another process can unpickle. timeout: seconds for
    one call of `score`, or infinity; loading, `check` and `report` have ten minutes at least. `setup` loads
    it in the first worker; the others start when they are needed. Raises UserError as the reward does,
    RewardFailed where it raises anything else or its workers are lost.

    served: as of the reward, where it has that: `HttpReward`. No worker goes on with another.
    """

    served: str | None = None

    def __init__(self, name: str, reward: Any, settings: Mapping, count: int, timeout: float):
        self.name, self.timeout = name, timeout
        try:
            self._pickled = pickle.dumps((reward, dict(settings)))
        except (pickle.PicklingError, AttributeError, TypeError):
            raise UserError(
                f"reward {name}: workers: expected a reward that another process can import, like "
                "package.module:name"
            ) from None
        self._workers = [_Worker() for _ in range(count)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put(worker)
        # before multiprocessing waits for its processes when the interpreter ends
        self.close = util.Finalize(self, _close, (self._workers,), exitpriority=10)

    def setup(self, device: str) -> None:
        self._device = device
        for method in self._ask("offers"):
            setattr(self, method, functools.partial(self._ask_patiently, method))

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float | None]:
        return self._ask("score", images, prompts, metadata, timeout=self.timeout)

    def _ask_patiently(self, method: str, *arguments: Any) -> Any:
        """For what is asked of all prompts or pictures at once."""
        return self._ask(method, *arguments, timeout=max(LOADING, self.timeout))

    def _ask(self, method: str, *arguments: Any, timeout: float = math.inf) -> Any:
        worker = self._idle.get()
        try:
            try:
                return self._ask_once(worker, method, arguments, timeout)
            except _Lost as lost:
                log.warning("reward %s: a worker %s; it is asked again", self.name, lost)
            try:
                return self._ask_once(worker, method, arguments, timeout)
            except _Lost as lost:
                raise RewardFailed(
                    f"reward {self.name}: expected values, but its worker {lost}, twice"
                ) from None
        finally:
            self._idle.put(worker)

    def _ask_once(self, worker: _Worker, method: str, arguments: tuple, timeout: float) -> Any:
        served = worker.start((self.name, self._pickled, self._device), max(LOADING, self.timeout))
        if served is not None:
            if self.served not in (None, served):
                worker.kill()
                wanted = f"expected scores of the server's reward {self.served}, got {served}"
                raise RewardFailed(f"reward {self.name}: {wanted}")
            self.served = served
        return worker.ask(method, arguments, timeout)


class _Worker:
    """One process, and the memory in which it gets pictures."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._memory: SharedMemory | None = None
        self._ended = False
        self._changing = threading.Lock()  # between a thread that starts it and the one that ends all

    def start(self, reward: tuple[str, bytes, str], timeout: float) -> str | None:
        """If it does not run. Returns what the reward says then that it has `served`.

        Raises UserError or OutOfMemoryError where the reward cannot be loaded.
        """
        if self._process is not None:
            return None
        with self._changing:
            if self._ended:
                raise UserError("the rewards' workers have been ended")
            self._connection, theirs = multiprocessing.Pipe()
            # no daemon, which may start no processes; `_close` comes before multiprocessing waits for it
            self._process = multiprocessing.get_context("spawn").Process(
                target=_work, args=(theirs, *reward), name="reward", daemon=False
            )
            resource_tracker.ensure_running()  # or it is started meanwhile, and lets SIGINT through again
            # a Ctrl-C before the worker has its own group
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        try:
            return self._answer(timeout)
        except BaseException:  # no memory too, which is tried again with a new one
            self.kill()
            raise

    def ask(self, method: str, arguments: tuple, timeout: float) -> Any:
        """What the reward's method returns. Raises _Lost if it dies or takes longer; then it has ended."""
        pictures, rest = None, arguments
        if arguments and isinstance(arguments[0], np.ndarray):
            pictures, rest = self._share(arguments[0]), arguments[1:]
        try:
            self._connection.send((method, pictures, rest))
        except OSError:
            self._lose()
        return self._answer(timeout)

    def _answer(self, timeout: float) -> Any:
        assert self._process is not None
        deadline, ended = time.monotonic() + timeout, False
        # what it has forked may hold its pipe, which then says nothing of its end
        while not self._connection.poll(min(LOOK, max(0.0, deadline - time.monotonic()))):
            if ended:
                self._lose()
            if time.monotonic() >= deadline:
                self._lose(f"gave no answer within {timeout:g} s")
            ended = _has_ended(self._process)
        try:
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            self._lose()
        if kind == "value":
            return answer
        if kind == "remote":
            base, name, text = answer
            raise type(name, (base,), {})(text)
        raise kind(answer)

    def _share(self, images: np.ndarray) -> tuple:
        """Puts them where the worker finds them; themselves, by the pipe, where shared memory is full."""
        if self._memory is None or self._memory.size < images.nbytes:
            self._release()
            try:
                memory = SharedMemory(create=True, size=max(images.nbytes, 1))
                _reserve(memory)
            except OSError:
                return None, images
            self._memory = memory
        shared = np.ndarray(images.shape, images.dtype, buffer=self._memory.buf)
        shared[...] = images
        return self._memory.name, (images.shape, images.dtype)

    def _lose(self, how: str | None = None) -> None:
        process, deadline = self._process, time.monotonic() + LOOK
        if how is None and process is not None:
            while not _has_ended(process) and time.monotonic() < deadline:
                time.sleep(0.01)  # what closed its pipe is about to end
        code = self.kill() or 0
        if how is None:
            how = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
        raise _Lost(how)

    def kill(self) -> int | None:
        """With all that it has started. Returns its exit code."""
        process, self._process = self._process, None
        if process is None or process.pid is None:
            return None
        try:  # also where it has ended, and what it has started has not; no join before has freed its number
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has not come to its own group yet, or is gone
            process.kill()
        process.join()
        self._connection.close()
        return process.exitcode

    def _release(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()
            memory.unlink()

    def end(self) -> None:
        """For good."""
        with self._changing:
            self._ended = True
            self.kill()
            self._release()


def _has_ended(process: multiprocessing.process.BaseProcess) -> bool:
    """Without freeing its number, which is its group's."""
    assert process.pid is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # seen already, when another one was started
        return True


def _close(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()


def _reserve(memory: SharedMemory) -> None:
    """Raises OSError where there is no room: a container may have 64 MB, and writing beyond kills."""
    file = SHARED / memory.name.lstrip("/")
    if not file.exists():
        return
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, memory.size)
    except OSError:
        memory.close()
        memory.unlink()
        raise
    finally:
        os.close(descriptor)


# -- in the worker ------------------------------------------------------------------------------------------


def _work(parent: connection.Connection, name: str, pickled: bytes, device: str) -> None:
    """Loads the reward and answers until the other end is closed."""
    os.setpgid(0, 0)
    _end_with_parent()
    # or a process that the reward has forked would keep half an answer waiting for its other half
    os.register_at_fork(after_in_child=parent.close)
    kind, reward = _outcome(name, _load, name, pickled, device)
    memory = _Memory()
    try:
        parent.send((kind, served_by(reward) if kind == "value" else reward))
        while True:
            method, pictures, arguments = parent.recv()
            if pictures is not None:
                arguments = (memory.pictures(*pictures), *arguments)
            parent.send_bytes(_pickled(name, _outcome(name, _call, name, reward, method, arguments)))
    except (EOFError, BrokenPipeError):
        return


def served_by(reward: Any) -> str | None:
    """What its server calls a reward that asks one; None of any other."""
    name = getattr(reward, "served", None)
    return name if isinstance(name, str) else None


def _outcome(name: str, function: Callable, *arguments: Any) -> tuple[Any, Any]:
    """`value` and what it returns, or what the other process is to raise."""
    try:
        with as_out_of_memory():
            return "value", function(*arguments)
    except UserError as error:
        return next(kind for kind in SENT if isinstance(error, kind)), str(error)
    except BaseException as error:
        base = next((kind for kind in TRIED_AGAIN if isinstance(error, kind)), None)
        if base is None and is_remote(error):
            base = ConnectionError
        if base is not None:
            return "remote", (base, type(error).__name__, str(error))
        return RewardFailed, failure(name, error)


def _pickled(name: str, outcome: tuple[Any, Any]) -> bytes:
    """For `recv`. What cannot be sent is the reward's fault, in one line."""
    try:
        return pickle.dumps(outcome)
    except Exception as error:
        problem = f"workers: expected what can be sent to another process, got {reason_of(error)}"
        return pickle.dumps((RewardFailed, f"reward {name}: {problem}"))


def _load(name: str, pickled: bytes, device: str) -> Any:
    from crd_fast.rewards.registry import load

    reward, settings = pickle.loads(pickled)
    found, _ = load(reward, settings)
    if hasattr(found, "setup"):
        with answers_for(name, torch.OutOfMemoryError), as_out_of_memory():  # which is tried again
            found.setup(device)
    return found


def _call(name: str, reward: Any, method: str, arguments: tuple) -> Any:
    if method == "offers":
        return [method for method in METHODS if hasattr(reward, method)]
    if method == "check":
        with refusals_of(name):
            reward.check(*arguments)
        return None  # whatever it returns means nothing
    with torch.no_grad():
        if method == "report":
            return dict(reward.report(*arguments))
        return with_none(checked(name, getattr(reward, "score", reward)(*arguments), len(arguments[0])))


class _Memory:
    """The pictures that are shared with the other process."""

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None

    def pictures(self, memory: str | None, found: Any) -> np.ndarray:
        """A read-only copy, which the reward may keep."""
        if memory is None:
            return read_only(found)
        if self._memory is None or self._memory.name != memory:
            if self._memory is not None:
                self._memory.close()
            self._memory = SharedMemory(memory)
        shape, dtype = found
        return read_only(np.array(np.ndarray(shape, dtype, buffer=self._memory.buf)))


def _end_with_parent() -> None:
    """Ends this process and what it has started once the parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    if hasattr(fcntl, "F_SETSIG"):  # by the kernel, also where a reward never lets this thread run
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_kill_after, args=(pipe,), daemon=True).start()


def _kill_after(pipe: int) -> None:
    connection.wait([pipe])
    os.killpg(0, signal.SIGKILL)
