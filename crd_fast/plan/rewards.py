"""What networks that look at pictures take on the GPU: rewards from before anything else is loaded on, judges
and the CLIP model of `evaluate.features` while an evaluation is scored. Between evaluations these wait on the
host.

A reward of one's own is not known here; at a reward's `path` the published model is expected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crd_fast.config import Recipe
from crd_fast.plan.live_bytes import LiveBytes, Peak, tensors_of
from crd_fast.rewards.workers import cores
from crd_fast.train.features import AT_ONCE
from crd_fast.train.places import RANDOM

FLOAT32 = 4


@dataclass(frozen=True)
class Network:
    """A reward's network: parameters, held in float32, and bytes of workspace for each picture of a batch."""

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
    """Peaks by phase, with the networks that look at pictures: rewards are there throughout and work beside
    the rollout, judges come for the scoring of an evaluation, when nothing else is at work, and go before the
    network of its features comes."""
    rewards, judges = reward_bytes(recipe.rewards), reward_bytes(recipe.eval_rewards)
    features = features_bytes(recipe)
    if not (rewards.weights or judges.weights or features.weights):
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
        judging = rewards.weights + max(
            rewards.workspace, *(one.weights + one.workspace for one in (judges, features))
        )
        result["judge"] = Peak(at_rest.bytes + judging, at_rest.parts | {"rewards": judging})
    return result


@dataclass(frozen=True)
class RewardBytes:
    """weights: of all that are there at once. workspace: of all that score at the same time."""

    weights: int = 0
    workspace: int = 0


def reward_bytes(rewards: Mapping[str, Any]) -> RewardBytes:
    """Memory of a recipe's `rewards` or `eval_rewards`. Each worker of a reward holds its own copy."""
    weights = workspace = 0
    for name, value in rewards.items():
        network = NETWORKS.get(name)
        if network is None:
            continue
        settings = value if isinstance(value, Mapping) else {}
        workers = settings.get("workers", 1)
        copies = workers if isinstance(workers, int) else max(1, cores() - 1)
        weights += copies * FLOAT32 * network.parameters
        batch = settings.get("batch")
        pictures = batch if isinstance(batch, int) else BATCHES.get(name, BATCH)
        workspace += copies * network.workspace * pictures
    return RewardBytes(weights, workspace)


def features_bytes(recipe: Recipe) -> RewardBytes:
    """Memory of the CLIP model of `evaluate.features`, if there is one."""
    path = recipe.evaluate.features
    if path in (None, RANDOM) or not recipe.evaluate.every:
        return RewardBytes()
    network = clip_network(str(path))
    return RewardBytes(FLOAT32 * network.parameters, AT_ONCE * network.workspace)


def waiting_bytes(recipe: Recipe) -> int:
    """Host memory between evaluations: judges, and the network of `evaluate.features`."""
    judges = reward_bytes(recipe.eval_rewards) if recipe.evaluate.every else RewardBytes()
    return judges.weights + features_bytes(recipe).weights


@functools.cache
def clip_network(path: str) -> Network:
    """The CLIP model in a folder, or with a hub id, by its config; the largest known model if the config is
    not on this machine."""
    from transformers import CLIPConfig, CLIPModel

    try:
        config: Any = CLIPConfig.from_pretrained(Path(path).expanduser(), local_files_only=True)
    except (OSError, ValueError):
        return NETWORKS["pickscore"]
    side = config.vision_config.image_size
    with FakeTensorMode(), torch.no_grad():
        return measured(
            [(CLIPModel(config), lambda m, n: m.vision_model(pixel_values=torch.zeros(n, 3, side, side)))], 32
        )


def measured(parts: Iterable[tuple[torch.nn.Module, Callable]], pictures: int) -> Network:
    """All parameters, and the workspace of the hungriest part for one picture.

    parts: networks, each with a function of it and a number of pictures, which it looks at. pictures: how
    many at once.
    """
    parameters = workspace = 0
    for model, forward in parts:
        model.eval()
        live = LiveBytes()
        live.move(tensors_of(model), "rewards")
        weights = live.total
        with live, live.in_phase("forward"):
            forward(model, pictures)
        parameters += sum(parameter.numel() for parameter in model.parameters())
        workspace = max(workspace, (live.peaks["forward"].bytes - weights) // pictures)
    return Network(parameters, workspace)
