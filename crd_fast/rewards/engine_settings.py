"""The settings of a reward that the engine takes, where the reward has no argument of that name."""

from __future__ import annotations

import math
import numbers
from typing import Any

from crd_fast.errors import UserError
from crd_fast.rewards.workers import cores

SKIP = "skip_others"  # of a reward that is asked for those prompts alone which it accepts
OPTIONAL = "optional"  # of a judge that is left out where a package of its is not installed
TAKEN = ("timeout", "retries", "workers", SKIP, OPTIONAL)
SUGGESTED = ("weight", "timeout", "retries", "workers", SKIP)


def engine_setting(name: str, key: str, value: Any) -> Any:
    """The value of one of them as it is used. Raises UserError for what it cannot be."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if key == "timeout" and not (number and 0 < value < math.inf):
        raise UserError(f"reward {name}: timeout: expected a number of seconds > 0, got {value!r}")
    if key == "retries" and not (number and value >= 0 and value == int(value)):
        raise UserError(f"reward {name}: retries: expected a whole number >= 0, got {value!r}")
    if key in (SKIP, OPTIONAL):
        if not isinstance(value, bool):
            raise UserError(f"reward {name}: {key}: expected true or false, got {value!r}")
        return value
    if key == "workers" and value == "auto":
        return max(1, cores() - 1)
    if key == "workers" and not (number and value >= 1 and value == int(value)):
        raise UserError(f"reward {name}: workers: expected auto or a whole number >= 1, got {value!r}")
    return float(value) if key == "timeout" else int(value)
