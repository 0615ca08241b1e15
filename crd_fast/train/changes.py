"""What may differ between a run's checkpoint and the recipe that it goes on with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crd_fast.config import Recipe, build_recipe
from crd_fast.errors import UserError
from crd_fast.prompts.lists import splits
from crd_fast.reward_weights import weight_of
from crd_fast.rewards.foreign import is_address

# where things are and go, how much goes through the network at once or is kept of it, how long and how often
HONOURED = (
    *("model.path", "model.prompt_cache", "model.prompt_cache_gb"),
    *("rollout.prompts", "rollout.micro_batch", "train.micro_batch"),
    *("train.checkpointing", "train.kept_graphs"),
    *("train.iterations", "train.learning_rate", "train.profile", "train.trackers"),
)
HONOURED_SECTIONS = ("evaluate", "eval_rewards", "checkpoint")
OF_SPLIT = ("evaluate.every", "evaluate.prompts", "rollout.prompts")  # whether files have a part held out
OF_REWARDS = (
    "url",
    "token_env",
    "timeout",
    "retries",
    "workers",
    "batch",
    "at_once",
)  # where they are, how they are asked

logger = logging.getLogger("crd_fast")


def check_changes(before: dict, recipe: Recipe, source: Path, say: bool = True) -> None:
    """Names each setting that differs from the checkpoint's recipe, `before`; not so without `say`.

    Raises UserError for one that would make it another run: what was trained so far was trained without it.
    """
    old = build_recipe(before, source=str(source))
    values, moved = old.model_dump(), moved_addresses(old.rewards, recipe.rewards)
    values["rewards"] = {moved.get(name, name): value for name, value in old.rewards.items()}
    found = list(differences(values, recipe.model_dump()))
    refused = [text for key, text in found if not _honoured(key)]
    if splits(old) != splits(recipe):
        changed = "; ".join(text for key, text in found if key.startswith(OF_SPLIT))
        what = "trains on prompts that were held out" if splits(old) else "holds out what was trained on"
        refused.append(f"{changed}, which {what}")
    if refused:
        raise UserError(
            f"{source}: made with another recipe: {'; '.join(refused)}; "
            "go on with the run's own, or train anew"
        )
    honoured = [f"rewards.{name} -> {now}" for name, now in moved.items()] + [text for _, text in found]
    for text in honoured if say else ():
        logger.warning("changed: %s", text)


def moved_addresses(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Servers by whose addresses rewards are named, and those that stand in their places now.

    {} where there are more or fewer.
    """
    gone = [name for name in old if is_address(name) and name not in new]
    come = [name for name in new if is_address(name) and name not in old]
    return dict(zip(gone, come)) if len(gone) == len(come) else {}


def check_served(
    state: Mapping[str, Any], rewards: Mapping[str, Any], served: Mapping[str, str], source: Path
) -> dict[str, str]:
    """What servers call the rewards at their addresses, `served`, and called those that do not say so now.

    state: of the checkpoint, of which earlier versions kept no such names. Raises UserError for another one.
    """
    moved = moved_addresses(state["recipe"]["rewards"], rewards)
    before = {moved.get(name, name): called for name, called in state.get("served", {}).items()}
    for name, called in served.items():
        if before.get(name, called) != called:
            raise UserError(
                f"{source}: trained with another reward: at {name} {before[name]} answered, now {called}; go "
                "on with the run's own, or train anew"
            )
    return before | dict(served)


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys whose values differ, dotted, each with what stood there and what stands there now."""
    if key.startswith(("rewards.", "eval_rewards.")) and (isinstance(old, dict) or isinstance(new, dict)):
        old, new = ({"weight": weight_of(of)} | (of if isinstance(of, dict) else {}) for of in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            if name not in old or name not in new:
                was, now = (repr(values.get(name, "nothing")) for values in (old, new))
                yield f"{key}{name}", f"{key}{name} {was} -> {now}"
            else:
                yield from differences(old[name], new[name], f"{key}{name}.")
    elif old != new:
        yield key.removesuffix("."), f"{key.removesuffix('.')} {old!r} -> {new!r}"


def _honoured(key: str) -> bool:
    section, _, name = key.partition(".")
    of_reward = section == "rewards" and name.rpartition(".")[2] in OF_REWARDS
    prompts = key.startswith("rollout.prompts.")  # the weight of one of several files
    return key in HONOURED or prompts or section in HONOURED_SECTIONS or of_reward
