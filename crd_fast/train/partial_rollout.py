"""What is finished of an iteration's rollout, in a file while the iteration is not."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crd_fast.config import Recipe
from crd_fast.file_modes import follow_umask
from crd_fast.weights import durable

FILE = "rollout.safetensors"

logger = logging.getLogger("crd_fast")


class PartialRollout:
    """An iteration may take an hour; a run that is stopped within it goes on with the latents it had.

    The file stands in the run's folder from a stop, or every `seconds`, to the end of the iteration. It is
    used where its key is the same, a digest of all that latents follow from, and its content what was
    written. Scores are made anew: a reward may have been mended since. Several processes have none: they
    would have to go on alike.
    """

    def __init__(self, folder: Path, seconds: float, active: bool):
        self._path, self._seconds, self._active = folder / FILE, seconds, active
        self._written_at = time.monotonic()
        self._forget()

    def _forget(self) -> None:
        self._make_key: Callable[[], str] | None = None
        self._key: str | None = None
        self._latents: torch.Tensor | None = None
        self.taken = 0  # of the present rollout's samples, those that an earlier process made

    def begin(self, key: Callable[[], str]) -> torch.Tensor | None:
        """The first latents of the rollout with this key, where an earlier process made some.

        key: called only where it is needed, since it takes a while.
        """
        self._make_key = key
        if not self._active or not self._path.exists():
            return None
        self._latents = self._read()
        if self._latents is not None:
            self.taken = len(self._latents)
            logger.warning("going on with %d samples of this iteration", self.taken)
        return self._latents

    def see(self, latents: torch.Tensor) -> None:
        """latents: all that are finished so far."""
        self._latents = latents
        if self._active and time.monotonic() - self._written_at >= self._seconds:
            self._write()

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """At its end, unless by an exception, there is nothing to go on with."""
        yield
        self._forget()
        if self._active:
            with suppress(OSError):  # not there, or something of somebody's
                self._path.unlink()

    def keep(self) -> None:
        """Writes down what is finished of an iteration that ended early."""
        if self._active and self._latents is not None and self._write():
            logger.warning("kept %d samples of the iteration that did not end", len(self._latents))

    def _digest(self) -> str:
        if self._key is None:
            assert self._make_key is not None
            self._key = self._make_key()
        return self._key

    def _write(self) -> bool:
        assert self._latents is not None
        latents = self._latents.cpu().contiguous()
        partial = self._path.with_name(FILE + ".partial")
        try:
            save_file({"latents": latents}, partial, {"key": self._digest(), "digest": digest({"": latents})})
            follow_umask(partial)
            durable.sync(partial)
            partial.replace(self._path)
        except (OSError, SafetensorError) as error:  # what ends the run is something else
            partial.unlink(missing_ok=True)
            logger.warning("warning: %s: cannot be written: %s", self._path, error)
            return False
        finally:
            self._written_at = time.monotonic()
        return True

    def _read(self) -> torch.Tensor | None:
        try:
            with safe_open(self._path, "pt") as file:
                about, latents = file.metadata() or {}, file.get_tensor("latents")
        except (OSError, SafetensorError) as error:
            logger.warning("warning: %s: left out, cannot be read: %s", self._path, error)
            return None
        if about.get("key") != self._digest():
            return None
        if about.get("digest") != digest({"": latents}):
            logger.warning("warning: %s: left out, damaged", self._path)
            return None
        return latents


def rollout_key(
    recipe: Recipe, model: object, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> str:
    """A digest of all that latents depend on. model: its description; inputs: seeds and embeddings."""
    sampler = {name: of for name, of in weights.items() if name.startswith("sampler/")}
    # what may be another one when a run goes on: folders may have been moved
    network = recipe.model.model_dump(exclude={"path", "prompt_cache", "prompt_cache_gb"})
    rollout = recipe.rollout.model_dump(exclude={"prompts", "micro_batch"})
    return digest(sampler | prefixed("given", inputs), model, network, rollout, recipe.train.precision)


def prefixed(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value for key, value in tensors.items()}


def digest(tensors: Mapping[str, torch.Tensor], *others: object) -> str:
    """SHA-256 of the tensors' names, layouts and bytes, and of `others`, written as JSON."""
    found = hashlib.sha256(json.dumps(others, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
