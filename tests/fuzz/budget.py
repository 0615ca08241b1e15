"""How much is tried, what counts as an answer, and how often there was one.

In the suite each test has a fixed number of cases, the same ones every time. `make fuzz` sets CRD_FAST_FUZZ,
how many times as many there are to be: other ones every time. A failure prints how it is repeated.
"""

import os
from collections import Counter

from hypothesis import HealthCheck, Phase, settings

from crd_fast.errors import UserError

TIMES = int(os.environ.get("CRD_FAST_FUZZ", "1"))
LONGEST = 1500  # characters of a refusal
TRIED: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()


def cases(count):
    """Settings of a test that the suite runs with so many cases."""
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate],  # to make a failure small may take longer than all the rest
        suppress_health_check=list(HealthCheck),
    )


def answer(kind, call, *arguments):
    """What the call returns; None where it refuses, which it does by a UserError of one line."""
    TRIED[kind] += 1
    try:
        return call(*arguments)
    except UserError as error:
        REFUSED[kind] += 1
        text = str(error)
        assert text.strip() and len(text.splitlines()) == 1 and len(text) <= LONGEST, repr(text)
        return None
