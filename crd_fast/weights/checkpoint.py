"""Checkpoints: safetensors for every tensor, JSON for the rest, nothing that runs code when it is loaded.

A checkpoint folder holds the trained weights in the formats of diffusers and peft and, for
resuming, `training.safetensors` (snapshots, optimizer) and `state.json`. It appears under its name only once
it is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crd_fast.errors import UserError
from crd_fast.weights.base import OptimizerState, Saved, Weights

FORMAT = 1
STATE, TENSORS = "state.json", "training.safetensors"


def save(folder: Path, weights: Saved, optimizer: OptimizerState, state: dict[str, Any], keep: int) -> None:
    """Writes `folder` whole or not at all, then removes the oldest of its siblings beyond `keep`."""
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    weights.save_policy(partial)
    tensors = {f"weights/{key}": value for key, value in weights.state().items()}
    optimizer_state, optimizer_tensors = flatten(optimizer.state_dict())
    tensors |= {f"optimizer/{key}": value for key, value in optimizer_tensors.items()}
    save_file(_unshared(tensors), partial / TENSORS)
    content = {"format": FORMAT, "optimizer": optimizer_state, **state}
    (partial / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in list_checkpoints(folder.parent)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("iteration-*") if (path / STATE).exists())


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in the folder, if there is one."""
    return next(reversed(list_checkpoints(folder)), None)


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run it is. UserError if none."""
    if (path / STATE).exists():
        return path
    found = newest(path / "checkpoints")
    if found is None:
        raise UserError(f"{path}: no checkpoint and no run with checkpoints")
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part. Raises UserError if it is damaged or of another format."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / STATE}: cannot be read: {error}") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{folder}: expected a checkpoint of format {FORMAT}, got {state.get('format')!r}")
    return state


def load(folder: Path, weights: Weights, optimizer: OptimizerState | None = None) -> dict[str, Any]:
    """Puts weights (and the optimizer, if given) back as they were. Returns the JSON state.

    Raises UserError for a damaged file or another model's checkpoint; nothing is changed then.
    """
    state = read_state(folder)
    tensors = read_tensors(folder / TENSORS)
    weights.load_state(_under(tensors, "weights/"))
    if optimizer is not None:
        optimizer.load_state_dict(unflatten(state["optimizer"], _under(tensors, "optimizer/")))
    return state


def describe(model) -> dict:
    """What a checkpoint must match."""
    parameters = sum(
        parameter.numel() for name, parameter in model.transformer.named_parameters() if "lora_" not in name
    )
    return {"name": model.name, "class": type(model.transformer).__name__, "parameters": parameters}


def check_same_model(state: dict, model, source: Path) -> None:
    """Raises UserError if a checkpoint's state is not this model's."""
    if state.get("model") != describe(model):
        raise UserError(
            f"{source}: a checkpoint of another model: expected {describe(model)}, got {state.get('model')}"
        )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file. Raises UserError if it is missing, truncated or otherwise damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read, it is missing or damaged ({error})") from None


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, no two in the same memory: bitsandbytes has one quantization map for all parameters."""
    taken, result = set(), {}
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        result[key] = value.clone() if storage in taken else value
        taken.add(storage)
    return result


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def flatten(state: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """An optimizer's state_dict as JSON, each tensor replaced by its key in a dict of tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value, path: str):
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [walk(item, f"{path}.{i}") for i, item in enumerate(value)]}
        return {"value": value}

    return walk(state, "state"), tensors


def unflatten(node: dict, tensors: dict[str, torch.Tensor]):
    kind, content = next(iter(node.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in content}
    if kind == "list":
        return [unflatten(item, tensors) for item in content]
    return content
