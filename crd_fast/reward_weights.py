"""What a recipe's `rewards` say of weights: `{name: weight}`, or `{name: {weight: 1.0, setting: value}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def weight_of(value: Any) -> Any:
    """The weight of one reward, as given; 1 if its settings have none."""
    return value.get("weight", 1.0) if isinstance(value, Mapping) else value


def trained_weights(rewards: object) -> dict[str, float]:
    """The weights of the trained rewards, those that are not 0; {} if `rewards` is no mapping."""
    if not isinstance(rewards, Mapping):
        return {}
    weights = {name: weight_of(value) for name, value in rewards.items()}
    return {name: weight for name, weight in weights.items() if weight}
