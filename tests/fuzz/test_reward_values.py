"""What a reward returns or raises: its numbers, or one line that names it."""

import asyncio
import decimal
import fractions
import itertools
import math
import subprocess
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.errors import UserError
from crd_fast.rewards import Rewards
from tests.fuzz.budget import TRIED, answer, cases

COUNT = 4
IMAGES = np.zeros((COUNT, 8, 8, 3), np.uint8)
METADATA = [{"prompt": "a"}] * COUNT


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Shouting(BaseException):
    pass


class Odd:
    """Looks like a number until it is asked."""

    def item(self):
        raise TypeError("not now")

    def __float__(self):
        return 1.0


def breaking_off():
    yield 1.0
    raise ValueError("in the middle")


ODD_VALUES = [
    *(None, True, "1", b"1", 1j, [1.0], {}, (), object(), Odd(), float, decimal.Decimal("0.5")),
    *(fractions.Fraction(1, 3), 10**400, -0.0, math.inf, math.nan, np.float16("nan"), np.float32(1)),
    *(np.bool_(True), np.datetime64("2026-01-01"), np.str_("1"), np.int8(3), np.array(2.0), np.array([1, 2])),
    *(np.ma.masked, torch.tensor(1.0), torch.tensor([1.0, 2.0]), torch.tensor(True), torch.tensor(math.nan)),
    *(torch.ones((), dtype=torch.bfloat16), torch.ones((), requires_grad=True), torch.tensor(1 + 1j)),
]
VALUES = st.floats() | st.integers() | st.sampled_from(ODD_VALUES)
CONTAINERS = [
    *(list, tuple, deque, iter, np.array, lambda v: np.array(v, dtype=object), torch.tensor, str, repr),
    *(lambda v: (value for value in v), lambda v: dict(enumerate(v)), lambda v: dict(enumerate(v)).values()),
    *(
        lambda v: (v, {}),
        lambda v: {"scores": v},
        lambda v: torch.tensor(v)[:, None],
        lambda v: [v],
    ),
    *(lambda v: itertools.chain(v, breaking_off()), lambda v: breaking_off(), lambda v: len(v)),
    *(lambda v: itertools.cycle(v or [0.0]), lambda v: itertools.count(), lambda v: v[0], lambda v: None),
    *(lambda v: set(map(id, v)), lambda v: asyncio.sleep, lambda v: np.ma.masked_array(v, mask=[1] * len(v))),
]
RAISED = [
    *(ValueError("two\nlines"), KeyError("x"), Silent(), Shouting("loud"), StopIteration(3), MemoryError()),
    *(RecursionError("deep"), SystemExit(0), SystemExit("words"), KeyboardInterrupt(), GeneratorExit()),
    *(asyncio.CancelledError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), OSError(28, "full")),
    *(ConnectionError("gone"), TimeoutError(), AssertionError(), Exception(), Exception("x" * 100_000)),
    *(ExceptionGroup("many", [ValueError("a"), ValueError("b")]), UserError("ours\nand more")),
    *(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ImportError("no module"), Warning("careful")),
    *(subprocess.CalledProcessError(1, ["a", "b"]), PermissionError(13, "no"), BrokenPipeError()),
    *(NotImplementedError(), ReferenceError("gone"), BufferError("x"), UnboundLocalError("x")),
    *(SyntaxError("x"), ArithmeticError(), EOFError("\x1b[2J")),
]
ANSWERS = {}


def reward(images, prompts, metadata):
    make = ANSWERS["now"]
    return make()


@pytest.fixture(scope="module")
def rewards():
    return Rewards({reward: {"weight": 1.0, "retries": 0, "timeout": 60.0}}, device="cpu")


def scored(rewards, make):
    ANSWERS["now"] = make
    found = answer("reward values", rewards.score, IMAGES, METADATA)
    if found is None:
        return None
    [values] = found.values()
    assert values.dtype == np.float64 and values.shape == (COUNT,) and not np.isinf(values).any()
    return values


@cases(300)
@given(
    values=st.lists(VALUES, min_size=COUNT, max_size=COUNT) | st.lists(VALUES, max_size=6),
    number=st.sampled_from([*[0] * 10, *range(len(CONTAINERS))]),
)
def test_what_is_returned(rewards, values, number):
    found = scored(rewards, lambda: CONTAINERS[number](values))
    if found is not None and number == 0:
        np.testing.assert_array_equal(
            found, [math.nan if value is None else float(value) for value in values]
        )


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("number", range(len(CONTAINERS)))
def test_every_kind_of_value_in_every_container(rewards, value, number):
    TRIED["kinds of reward values"] += 1
    found = scored(rewards, lambda: CONTAINERS[number]([1.0, 2.0, 3.0, value]))
    if found is not None:  # None, and nothing else, is not scored
        assert value is not np.ma.masked
        assert not np.isnan(found[:3]).any() and (value is None or not np.isnan(found[3]))


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_is_raised(rewards, error, monkeypatch):
    monkeypatch.setattr("crd_fast.rewards.scoring.FIRST_PAUSE", 0.001)

    def make():
        raise error

    TRIED["kinds of exceptions"] += 1
    assert scored(rewards, make) is None


def test_numbers_are_taken(rewards):
    assert scored(rewards, lambda: [1, np.float32(2), torch.tensor(3.0), fractions.Fraction(4)]).tolist() == [
        1.0,
        2.0,
        3.0,
        4.0,
    ]
