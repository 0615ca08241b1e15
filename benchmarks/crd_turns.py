"""Two ways to compute one thing, timed by taking turns.

On a machine that is not quiet, or a GPU that grows warm, figures taken one after another say more about the
moment than about what is compared. Here each round times both; what is reported is the median of the
rounds' ratios and their quartiles.
"""

import contextlib
import gc
import statistics
import time
from dataclasses import asdict, dataclass

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: summed over the process's threads


@dataclass(frozen=True)
class Spread:
    """The median of some figures and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures):
        low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, low, high)

    def as_dict(self):
        return asdict(self)


def take_turns(runs, rounds, time_of):
    """{name: seconds of each round} of one or two `runs`; `time_of(run)` times one.

    The order is turned round after every round, so that in any round both come after the same one: what
    that one left in the caches helps or hurts both alike. With three that would not hold.
    """
    if len(runs) > 2:
        raise ValueError(f"runs: expected one or two to take turns, got {len(runs)}")
    timed = {name: [] for name in runs}
    order = list(runs)
    with _no_collector():
        for _ in range(rounds):
            for name in order:
                timed[name].append(time_of(runs[name]))
            order.reverse()
    return timed


def ratio(timed, other, ours):
    """Spread of other / ours over the rounds: above 1 where ours is faster."""
    return Spread.of([a / b for a, b in zip(timed[other], timed[ours])])


def stopwatch(clock, calls=1):
    """A `time_of` for `take_turns` on the CPU: seconds of one call, the mean of `calls` in a row."""

    def time_of(run):
        start = clock()
        for _ in range(calls):
            kept = run()  # noqa: F841  the last result is freed after the clock has stopped
        return (clock() - start) / calls

    return time_of


@contextlib.contextmanager
def _no_collector():
    """Python's garbage collector would run in whichever turn it is due."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
