"""How a run is watched: observers are told of its phases, its forwards and its progress as they happen.

A class of one's own, with the methods of `Observer` that it needs, is handed to `Trainer(..., observer=...)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


class Observer:
    """The interface, which sees nothing: a subclass overrides what it wants to see, and changes no number."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """A part of the run, inside others: encoding; iteration; rollout (prompts, decode); rewards; update
        (old, reference, forwards in one batch, measure, center, backward, optimizer); snapshots; evaluation
        and guided base (scoring); drift; checkpoint.

        total: how many samples, pairs of sample and timestep, or prompts, it goes through, where it counts
        them by `advance`.
        """
        yield

    @contextmanager
    def branch(self, name: str, rows: int) -> Iterator[None]:
        """One forward of the network, in which `rows` rows use the weights `name`: policy, old, sampler or
        reference. Where the rows of one forward differ in their weights, branches are inside one another.
        """
        yield

    def advance(self, count: int) -> None:
        """The innermost phase that has a total is `count` further."""

    def evaluated(self, record: dict) -> None:
        """An evaluation is done: its metrics, scores and grid are in the run's folder. At iteration 0 too."""

    def iteration_done(self, record: dict) -> None:
        """The iteration's metrics are known."""


NOBODY = Observer()


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer):
        self.all = list(observers)

    def add(self, observer: Observer) -> None:
        """From now on it is told as well."""
        self.all.append(observer)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self.all:
                stack.enter_context(observer.phase(name, total))
            yield

    @contextmanager
    def branch(self, name: str, rows: int) -> Iterator[None]:
        with ExitStack() as stack:
            for observer in self.all:
                stack.enter_context(observer.branch(name, rows))
            yield

    def advance(self, count: int) -> None:
        for observer in self.all:
            observer.advance(count)

    def evaluated(self, record: dict) -> None:
        for observer in self.all:
            observer.evaluated(record)

    def iteration_done(self, record: dict) -> None:
        for observer in self.all:
            observer.iteration_done(record)


def observed(name: str) -> Callable:
    """A method that is a phase of its object's `observer`."""

    def decorate(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            with self.observer.phase(name):
                return method(self, *args, **kwargs)

        return run

    return decorate
