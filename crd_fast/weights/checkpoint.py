"""Checkpoints: safetensors for every tensor, JSON for the rest, nothing that runs code when it is loaded.

A checkpoint folder holds the trained weights in the formats of diffusers and peft and, for
resuming, `training.safetensors` (snapshots, optimizer) and `state.json`; `manifest.json` has the size and the
hash of each file. It appears under its name only once it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crd_fast.errors import UserError
from crd_fast.file_modes import follow_umask
from crd_fast.models.checks import transformer_fingerprint
from crd_fast.models.components import count_parameters
from crd_fast.weights import durable
from crd_fast.weights.base import OptimizerState, Saved, Weights

FORMAT = 2
WITHOUT_MANIFEST = 1  # the format before: taken as it is
STATE, TENSORS = "state.json", "training.safetensors"
MARKS = (STATE, durable.MANIFEST)  # files that say that a folder is a checkpoint
PARTIAL, DAMAGED, COPIED, OTHER, BEST = "partial-", "damaged-", "copied-", "other-", "best"
FINGERPRINT = "fingerprint"  # of the base's files, in what a checkpoint says of its model
NAME = re.compile(r"iteration-(\d{6,})")

logger = logging.getLogger("crd_fast")


def save(
    folder: Path,
    weights: Saved,
    optimizer: OptimizerState,
    state: dict[str, Any],
    keep: int,
    best: int | None = None,
    used: str = "policy",
) -> None:
    """Writes `folder` whole or not at all, then removes the oldest of its siblings beyond `keep`.

    best: the iteration whose checkpoint stays as well. used: the weights that other libraries are to load.
    Removed are files that a manifest names, and nothing else; a folder that has the name already is put
    aside. Raises UserError, and leaves all as it was, for numbers that are not finite and where the disk
    takes no more.
    """
    tensors = {f"weights/{key}": value for key, value in weights.state().items()}
    optimizer_state, optimizer_tensors = flatten(optimizer.state_dict())
    tensors |= {f"optimizer/{key}": value for key, value in optimizer_tensors.items()}
    tensors = _unshared(tensors)
    _check_finite(folder, tensors)
    content = {"format": FORMAT, "optimizer": optimizer_state, **state}
    partial = folder.with_name(PARTIAL + folder.name)
    try:
        for left in folder.parent.glob(f"{PARTIAL}*"):  # by a process that was killed
            if NAME.fullmatch(left.name.removeprefix(PARTIAL)):
                shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        weights.save_policy(partial, used)
        save_file(tensors, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        follow_umask(partial)
        durable.seal(partial)
        if os.path.lexists(folder):
            aside = _put_aside(folder, OTHER)
            logger.warning("warning: %s: was there already: it is now called %s", folder, aside.name)
        partial.rename(folder)
        durable.sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written: {reason}") from error
    _remove_old(folder.parent, keep, best)


def _remove_old(folder: Path, keep: int, best: int | None) -> None:
    kept = {iteration_of(path) for path in list_checkpoints(folder)[-keep:]} | {best}
    for path in list_checkpoints(folder):
        if iteration_of(path) not in kept:
            try:
                durable.remove(path, first=STATE)
            except OSError as error:
                logger.warning("warning: %s: cannot be removed: %s", path, error.strerror)


def mark_best(folder: Path) -> None:
    """Makes `best`, beside the checkpoint, a link to it, where the file system has links.

    A copy of the run may have a checkpoint itself in the link's place: it gets another name, which is said.
    """
    link, partial = folder.with_name(BEST), folder.with_name(PARTIAL + BEST)
    taken = link.exists() and not link.is_symlink()
    if taken and not is_checkpoint(link):
        return  # somebody else's
    with contextlib.suppress(OSError, NotImplementedError):
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder.name)
        if taken:
            aside = _put_aside(link, COPIED)
            logger.warning("warning: %s: a copy where a link was: it is now called %s", link, aside.name)
        partial.replace(link)


def marked_best(folder: Path) -> int | None:
    """The iteration of the checkpoint that `best` in the folder means; None where it means none.

    A link to one that is gone is removed: another may get its name.
    """
    link = folder / BEST
    if link.is_symlink() and not link.exists():
        link.unlink(missing_ok=True)
    if not is_checkpoint(link):
        return None
    with contextlib.suppress(UserError, KeyError):
        return int(read_state(link)["iteration"])
    return None


def iteration_of(folder: Path) -> int:
    """The iteration after which a checkpoint was made, by its name; -1 for what is none."""
    found = NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by their names, oldest first, damaged ones among them."""
    found = (path for path in folder.glob("iteration-*") if iteration_of(path) >= 0 and path.is_dir())
    return sorted(found, key=iteration_of)


def newest(folder: Path, put_aside: bool = False) -> Path | None:
    """The newest whole checkpoint in the folder; None where there is none.

    One that is damaged is named, and the one before it taken. put_aside: those that were passed over get
    another name, so that they count for nothing any more. Raises UserError where all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        reason = _damage(path)
        if reason is None:
            for other, what in damaged:
                aside = f" (it is now called {_put_aside(other, DAMAGED).name})" if put_aside else ""
                logger.warning("warning: %s: %s: taking %s instead%s", other, what, path.name, aside)
            return path
        damaged.append((path, reason))
    if damaged:
        path, reason = damaged[0]
        raise UserError(f"{path}: {reason}; no checkpoint before it is whole")
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder says that it is one, whole or not."""
    return any((path / name).exists() for name in MARKS)


def find(path: Path, which: str | None = None) -> Path:
    """The whole checkpoint that `path` means: itself, or one of the run it is. UserError if none.

    which: `best`, `newest` or an iteration, of a run. By default the best by the held-out score where one is
    marked, which is said where a newer one is there, else the newest.
    """
    if is_checkpoint(path):
        if which is not None:
            raise UserError(f"--checkpoint: {path} is a checkpoint already; expected a run with it")
        return _whole(path)
    folder = path / "checkpoints"
    there = list_checkpoints(folder)
    known: dict[str, Path] = {}
    if is_checkpoint(folder / BEST):
        known[BEST] = next((found for found in there if found.samefile(folder / BEST)), folder / BEST)
    known |= {str(iteration_of(found)): found for found in there}
    if which == "newest" or (which is None and BEST not in known):
        found = newest(folder)
        if found is None:
            raise UserError(f"{path}: no checkpoint and no run with checkpoints")
        return found
    if (which or BEST) not in known:
        raise UserError(
            f"--checkpoint: {path} has no {which}, expected one of {', '.join(['newest', *known])}"
        )
    found = known[which or BEST]
    if which is None and there and found != there[-1]:
        logger.warning(
            "%s: taking %s, the best by the held-out score; the newest: %s", path, found, there[-1]
        )
    return _whole(found)


def _whole(folder: Path) -> Path:
    """The same. Raises UserError where it is damaged."""
    reason = _damage(folder)
    if reason is not None:
        raise UserError(f"{folder}: {reason}")
    return folder


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    if not (folder / durable.MANIFEST).exists():
        try:
            state = read_state(folder)
        except UserError as error:
            return str(error)
        if state["format"] == WITHOUT_MANIFEST:
            return None
    return durable.damage(folder)


def _put_aside(folder: Path, prefix: str) -> Path:
    """Renames what has a checkpoint's name and is none that counts. Returns its new name."""
    names = (f"{prefix}{folder.name}" + f".{count}" * (count > 0) for count in itertools.count())
    return folder.rename(next(p for p in map(folder.with_name, names) if not os.path.lexists(p)))


def _check_finite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{folder}: not written: {name}: expected finite numbers, got NaN or infinity")


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part. Raises UserError if it is damaged or of another format."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / STATE}: cannot be read: {error}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found not in (WITHOUT_MANIFEST, FORMAT):
        raise UserError(f"{folder}: expected a checkpoint of format {FORMAT}, got {found!r}")
    return state


def load(folder: Path, weights: Weights, optimizer: OptimizerState | None = None) -> dict[str, Any]:
    """Puts weights (and the optimizer, if given) back as they were. Returns the JSON state.

    Raises UserError for a damaged file or another model's checkpoint.
    """
    state = read_state(folder)
    tensors = read_tensors(folder / TENSORS)
    weights.load_state(_under(tensors, "weights/"))
    if optimizer is not None:
        try:
            optimizer.load_state_dict(unflatten(state["optimizer"], _under(tensors, "optimizer/")))
        except (KeyError, ValueError) as error:
            raise UserError(f"{folder}: expected the state of this run's optimizer: {error}") from error
    return state


def describe(model) -> dict:
    """What a checkpoint must match."""
    parameters = count_parameters(model.transformer, without="lora_")
    described = {"name": model.name, "class": type(model.transformer).__name__, "parameters": parameters}
    folder = getattr(model, "folder", None)  # a pipeline has one
    return described if folder is None else described | {FINGERPRINT: transformer_fingerprint(folder)}


def check_same_model(state: dict, model, source: Path, trains: bool = False) -> dict:
    """What `describe` says of the model. Raises UserError if a checkpoint's state is not this model's.

    Where it is another base of the same shape, as its files say, that is a warning, for they may be the same
    weights in other files; not where the model is trained on.
    """
    before, described = dict(state.get("model") or {}), describe(model)
    own = dict(described)
    known, found = before.pop(FINGERPRINT, None), own.pop(FINGERPRINT, None)
    if not known and state.get("recipe", {}).get("model", {}).get("quantization") == "nf4":
        before["parameters"] = own["parameters"]  # earlier versions counted bytes of 4-bit weights
    if before != own:
        raise UserError(f"{source}: a checkpoint of another model: expected {own}, got {before}")
    if known and found and known != found:
        said = f"{source}: the transformer's files in {model.folder} are not those that it was trained on"
        if trains:
            raise UserError(f"{said}; expected the same, to go on")
        logger.warning("warning: %s: another base gives other pictures", said)
    return described


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
