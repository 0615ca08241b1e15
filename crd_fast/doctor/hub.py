"""Checks of what downloads need: a login at the Hugging Face hub, and room in its cache. Nothing is sent."""

from __future__ import annotations

import shutil
from pathlib import Path

from crd_fast.doctor.check import GIB, Check, attempt, gib

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
