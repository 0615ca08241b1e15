"""A pipeline's networks with their weights, from their folders."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from crd_fast.errors import UserError, reason_of
from crd_fast.models import checks

logger = logging.getLogger("crd_fast")


def with_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of diffusers or transformers, all of whose weights are in its folder.

    Raises UserError, one line with the folder, where its config and its weights do not go together: both
    libraries would begin with random numbers in place of what they miss. What the config does not ask for is
    left out, with a warning.
    """
    try:
        network, info = kind.from_pretrained(
            folder, dtype=dtype, variant=checks.variant(folder), output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the two raise for a config or for files
        reason = reason_of(error)
        raise UserError(f"model.path: {folder}: cannot be loaded: {reason}") from error
    lacking = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in info[name])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"model.path: {folder}: cannot be loaded: no weights for {lacking[0]}{more}, which its "
            "config.json asks for"
        )
    if left := sorted(str(key) for key in info["unexpected_keys"]):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        logger.warning(
            "warning: model.path: %s: weights that its config.json does not ask for are left out: %s%s",
            folder,
            left[0],
            more,
        )
    return network


def count_parameters(network: torch.nn.Module, without: str | None = None) -> int:
    """The number of a network's parameters, also of packed 4-bit ones. without: part of names not counted."""
    return sum(
        math.prod(parameter.quant_state.shape) if hasattr(parameter, "quant_state") else parameter.numel()
        for name, parameter in network.named_parameters()
        if without is None or without not in name
    )
