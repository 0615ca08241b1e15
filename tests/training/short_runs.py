"""Whole runs of the small model that take a second or two, and what is read of them."""

from crd_fast.config import load_recipe
from crd_fast.run.metrics import MEASURED, read_metrics
from crd_fast.weights import checkpoint

SETTINGS = [
    "rollout.prompts_per_iteration=2",
    "rollout.samples_per_prompt=2",
    "rollout.steps=2",
    "train.timesteps=1",
    "train.steps_per_iteration=1",
    "train.iterations=3",
    "evaluate.every=2",
    "evaluate.steps=1",
    "evaluate.max_prompts=4",
    "model.method=lora",
]


def recipe(*more):
    return load_recipe("builtin", [*SETTINGS, *more])


def records(run):
    return [{k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in read_metrics(run)]


def saved(run):
    return [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")]
