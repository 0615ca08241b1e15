"""What networks that score pictures take on the GPU: rewards from before anything else is loaded on, judges
while an evaluation is scored.

A reward of one's own is not known here; at a reward's `path` the published model is expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crd_fast.config import Recipe
from crd_fast.plan.live_bytes import Peak
from crd_fast.rewards.workers import cores

FLOAT32 = 4


@dataclass(frozen=True)
class Network:
    """Of one reward: parameters, held in float32, and bytes of workspace for each picture of a batch."""

    parameters: int
    workspace: int


# By tools/reward_sizes.py, from the published models' sizes.
NETWORKS = {
    "pickscore": Network(986_109_441, 21_655_552),
    "clipscore": Network(151_277_313, 3_059_712),
    "aesthetic": Network(303_966_208, 17_444_864),
    "hpsv2": Network(986_109_441, 21_655_552),
    "imagereward": Network(445_278_720, 12_768_832),
    "geneval_mask2former": Network(496_357_596, 724_981_334),
}
BATCHES = {"geneval_mask2former": 4}  # pictures at once; a setting of the reward
BATCH = 32


def with_rewards(peaks: dict[str, Peak], recipe: Recipe) -> dict[str, Peak]:
    """Peaks by phase, with the networks that score pictures: rewards are there throughout and work beside the
    rollout, judges come for the scoring of an evaluation, when nothing else is at work."""
    rewards, judges = reward_bytes(recipe.rewards), reward_bytes(recipe.eval_rewards)
    if not rewards.weights and not judges.weights:
        return peaks
    taken = {name: rewards.weights for name in peaks}
    for name in ("rollout", "decode"):
        taken[name] += rewards.workspace
    result = {
        name: Peak(peak.bytes + taken[name], peak.parts | {"rewards": taken[name]})
        for name, peak in peaks.items()
    }
    if recipe.evaluate.every:
        at_rest = peaks["checkpoint"]
        judging = rewards.weights + max(rewards.workspace, judges.weights + judges.workspace)
        result["judge"] = Peak(at_rest.bytes + judging, at_rest.parts | {"rewards": judging})
    return result


@dataclass(frozen=True)
class RewardBytes:
    """weights: of all that are there at once. workspace: of all that score at the same time."""

    weights: int = 0
    workspace: int = 0


def reward_bytes(rewards: Mapping[str, Any]) -> RewardBytes:
    """Of a recipe's `rewards` or `eval_rewards`. Each worker of a reward holds a copy of its own."""
    weights = workspace = 0
    for name, value in rewards.items():
        network = NETWORKS.get(name)
        if network is None:
            continue
        settings = value if isinstance(value, Mapping) else {}
        workers = settings.get("workers", 1)
        copies = workers if isinstance(workers, int) else max(1, cores() - 1)
        weights += copies * FLOAT32 * network.parameters
        workspace += copies * network.workspace * settings.get("batch", BATCHES.get(name, BATCH))
    return RewardBytes(weights, workspace)
