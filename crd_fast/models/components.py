"""A pipeline's networks with their weights, from their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crd_fast.errors import UserError, reason_of
from crd_fast.models import checks


def with_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network of diffusers or transformers, all of whose weights are in its folder.

    Raises UserError, one line with the folder, where its config and its weights do not go together: both
    libraries would begin with random numbers in place of what they miss.
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
    return network
