"""Checks of what downloads need: a login at the Hugging Face hub, room in its cache, access to a model.

Nothing is sent but where a model is named: the hub is then asked for that one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from crd_fast.doctor.check import GIB, Check, attempt, gib
from crd_fast.errors import did_you_mean
from crd_fast.worlds import WORLDS

# parts of the hub ids whose weights are given only to those who accepted a licence at the model's page
GATED = ("stable-diffusion-3.5", "FLUX.1-dev")
LITTLE = 20 * GIB  # below which a person should look at what a download takes


def has_token() -> bool:
    """Whether somebody has logged in here, or the environment has a token."""
    hub, _ = attempt("huggingface_hub")
    return hub is not None and bool(hub.get_token())


def login() -> Check:
    if has_token():
        return Check("hub login", "ok", "a token is there", "whether it may read a model, its download says")
    return Check("hub login", "ok", "none", "only gated models need one: hf auth login")


def cache() -> Check:
    """The disk that models are downloaded to."""
    constants, reason = attempt("huggingface_hub.constants")
    if constants is None:
        return Check("model cache", "warning", "unknown", reason)
    folder = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(
            "model cache", "warning", f"unknown: {error.strerror}", f"HF_HOME names another than {folder}"
        )
    found = f"{gib(free)} free for {folder}"
    if free < LITTLE:
        note = "HF_HOME names another disk; crd-fast plan says how much a model takes"
        return Check("model cache", "warning", found, note)
    return Check("model cache", "ok", found)


def access(model: str) -> Check:
    """Whether the hub gives this person a model's files. model: a short name, a recipe's, or a hub id."""
    path = hub_id(model)
    if Path(path).expanduser().is_dir():
        return Check("model", "ok", f"a folder here, {path}")
    if path in WORLDS:
        return Check("model", "ok", f"{path}: ships with this package")
    if "/" not in path:
        found = f"{path}: no hub id, ORG/NAME, and no short name{_nearest(path)}"
        return Check("model", "missing", found, "name another model: crd-fast recipes lists those known here")
    hub, reason = attempt("huggingface_hub")
    errors, _ = attempt("huggingface_hub.errors")
    if hub is None or errors is None:
        return Check("model", "warning", f"{path}: unknown", reason)
    page = f"https://huggingface.co/{path}"
    try:
        hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT")).auth_check(path)
    except errors.GatedRepoError:
        return Check(
            "model", "missing", f"{path}: gated", f"accept the licence at {page}, then hf auth login"
        )
    except errors.RepositoryNotFoundError:
        note = "look at the name, or hf auth login where it is private"
        return Check("model", "missing", f"{path}: not on the hub", note)
    except Exception as error:  # no network, a proxy, a hub that does not answer
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        return Check("model", "warning", f"{path}: unknown", f"the hub did not say: {why}")
    return Check("model", "ok", f"{path}: may be downloaded")


def _nearest(name: str) -> str:
    from crd_fast.config import recipe_names, recipes_by_model

    return did_you_mean(name, [*recipes_by_model(), *recipe_names()])


def hub_id(model: str) -> str:
    """The hub id for a model's or a recipe's short name; anything else is taken for a hub id."""
    from crd_fast.config import load_recipe, recipe_names, recipes_by_model  # where pydantic is missing, too

    name = next(iter(recipes_by_model().get(model, {}).values()), model)
    return load_recipe(name).model.path if name in recipe_names() else model
