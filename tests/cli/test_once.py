"""Warnings of libraries that come with every item are said once and counted."""

import logging

import pytest

from crd_fast import once
from tests.cli.conftest import SMALL

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs

MODULE = """
import warnings

calls = []


def warns(images, prompts, metadata):
    calls.append(1)
    warnings.warn(f"call {len(calls)} has a [bold]colour[/bold] of its own")
    return [float(image.mean()) for image in images]
"""


def test_a_warning_that_differs_with_every_call_is_said_once(inside, small, tmp_path, monkeypatch):
    (tmp_path / "warning_reward.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    small.write_text(SMALL.replace("every: 2,", "every: 0,") + "rewards: {'warning_reward:warns': 1.0}\n")
    code, _, err = inside("train", small, "--output", tmp_path / "run")
    assert code == 0, err
    lines = [line for line in err.splitlines() if "of its own" in line]
    assert lines[0].startswith("warning: UserWarning: call 1 has a [bold]colour[/bold] of its own (")
    assert lines[1:] == ["warning: warned 5 times: call 1 has a [bold]colour[/bold] of its own"]


@pytest.fixture
def library(caplog):
    """A library with a logger and a handler of its own, as diffusers has it; what it printed."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("some_library")
    logger.addHandler(handler)
    once.once.forget()
    once.hush("some_library")
    once.hush("some_library")
    yield logger, said
    logger.removeHandler(handler)


def test_loggers_of_libraries(library):
    logger, said = library
    for item in range(3):
        logger.warning("item %d was cut", item)
    logger.warning("something else")
    for _ in range(2):
        logger.error("broken")
    assert said == ["item 0 was cut", "something else", "broken", "broken"]
    assert once.once.summary() == ["warned 3 times: item 0 was cut"]
