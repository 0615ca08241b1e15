"""What a reward raises: in one line that names it, and what follows from it."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType

from crd_fast.errors import MissingPackage, UserError
from crd_fast.rewards.lent import WRITES, writes_to_images

LONGEST = 600  # characters of the message of a reward's exception
# of requests, httpx, and the clients of OpenAI and Anthropic
UNREACHED = ("ConnectionError", "Timeout", "TransportError", "APIConnectionError", "RateLimitError")
# what stands between the engine and a reward
CALLERS = {
    str(Path(__file__).with_name(f"{name}.py"))
    for name in ("failures", "scoring", "workers", "registry", "foreign")
}
CALLERS.add(str(importlib.__file__))


class RewardFailed(UserError):
    """The reward raised, its workers died or hung, its server failed: nothing that is wrong with what it was
    given."""


def refuses(error: UserError) -> bool:
    """Whether a reward's check has refused what it was given, and not failed itself."""
    return not isinstance(error, RewardFailed) and isinstance(error.__cause__, (ValueError, NoneType))


@contextmanager
def refusals_of(name: str, where: bool = True) -> Iterator[None]:
    """A ValueError of a reward's check as the UserError that says what it refuses."""
    try:
        yield
    except ValueError as error:
        raise UserError(failure(name, error, where)) from None


def is_remote(error: BaseException) -> bool:
    """Whether something was not to be reached, or not in time: by Python's own errors, and by those of the
    libraries that rewards ask servers with, which are none of Python's."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(kind.__name__ in UNREACHED for kind in type(error).__mro__)


@contextmanager
def answers_for(name: str, *others: type[BaseException]) -> Iterator[None]:
    """Whatever a reward's code raises, the end of the process too, as a UserError that names the reward;
    MissingPackage for what cannot be imported. others: what goes through as it is."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except others:
        raise
    except ImportError as error:
        raise MissingPackage(failure(name, error)) from error
    except BaseException as error:
        raise UserError(failure(name, error)) from error


def failure(name: str, error: BaseException, where: bool = True) -> str:
    """One line: which reward raised what, and where."""
    said = WRITES if writes_to_images(error) else what(error)
    return f"reward {name}: {said}{_where(error) if where else ''}"


def what(error: BaseException) -> str:
    """An exception's type and message, shortened."""
    try:
        text = str(error)
    except Exception:  # one of its own, which cannot be written
        text = ""
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    if isinstance(error, SystemExit):
        return f"wanted to end the process (SystemExit: {text})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    """The last line of the reward's own file that led to the error."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in CALLERS and not frame.filename.startswith("<frozen importlib")
    ]
    if not frames:
        return ""
    own = [frame for frame in frames if frame.filename == frames[0].filename][-1]
    return f" ({own.filename} line {own.lineno})"
