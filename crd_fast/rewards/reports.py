"""What an evaluation says of rewards, and what is to be said where there is nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from crd_fast.errors import UserError


def means(values: Mapping[str, np.ndarray], kind: str) -> dict[str, float]:
    """`KIND/NAME`, the mean over what was scored, and its share where that is not all: `scored/NAME` of a
    reward and `scored/judge/NAME` of a judge, for both may have one name."""
    found: dict[str, float] = {}
    scored = "scored" if kind == "reward" else f"scored/{kind}"
    for name, of in values.items():
        share = float(np.mean(~np.isnan(of)))
        if share:
            found[f"{kind}/{name}"] = float(np.nanmean(of))
        if share < 1:
            found[f"{scored}/{name}"] = share
    return found


def add_reported(name: str, found: Mapping, known: dict, by: dict[str, str]) -> None:
    """Adds what a reward reports to what is known; by: who reported what. Raises UserError where another one
    has reported something else under the same name; GenEval's rewards all report the same."""
    for key, value in found.items():
        if key in known and not np.array_equal(known[key], value, equal_nan=True):
            raise UserError(f"reward {name}: its report names {key}, to which {by[key]} gives another value")
        known[key] = value
        by.setdefault(key, name)


def unscored(prompt: str) -> UserError:
    """What is to be raised for a prompt whose pictures have no reward."""
    shown = prompt if len(prompt) <= 200 else prompt[:200] + "..."
    return UserError(f"rewards: expected at least one that scores pictures of {shown!r}, got None of all")
