"""What a reward is given: pictures and metadata of its own, so that nothing it does reaches anything else.

A reward is somebody's code. The arrays that the engine keeps, for other rewards, judges and the sample grid,
are never in its hands: it gets a copy, made just before the call, which costs less than any look for changes
would. The copy is marked read-only, because what writes to it is a mistake that its author wants to hear of;
the mark alone is not enough, since `torch.from_numpy` takes no notice of it.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np

WRITES = "writes to its images, which are read-only; images.copy() may be drawn on"
# torch warns of what the copy makes harmless
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def lent_images(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A read-only copy of the chosen ones. images: uint8 (N, height, width, 3)."""
    return read_only(images[rows])


def read_only(images: np.ndarray) -> np.ndarray:
    """The array itself, marked."""
    images.flags.writeable = False
    return images


def lent_metadata(metadata: list[dict]) -> list[dict]:
    """Deep copies, each entry by itself: samples of one prompt do not share theirs."""
    return [copy.deepcopy(entry) for entry in metadata]


def writes_to_images(error: BaseException) -> bool:
    """Whether it is what numpy raises where a read-only array is written to."""
    return isinstance(error, ValueError) and "read-only" in str(error)
