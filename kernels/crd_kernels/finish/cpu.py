"""What comes after the sums on the CPU: one call of C++ (finish.cpp), else the definition."""

import ctypes

import torch

from ..native import build
from ..native.problem import DTYPES
from ..problem import METHODS, WEIGHTINGS, Kind, Numbers, Scalars
from ..velocity.stats import OUTCOME, Stats
from . import reference

REALS, WORDS = ctypes.c_double * 9, ctypes.c_int64 * 23


def finish(table, scalars: Scalars, kind: Kind, numbers: Numbers):
    """The loss, () or (B,), and the outcome (OUTCOME, B), from the (ROWS, B) table of statistics."""
    if build.library() is None:
        return reference.finish(Stats(table, 0), scalars, kind, numbers)
    outcome = table.new_empty((OUTCOME, table.shape[1]))
    run = Finish(kind, table.shape[1], table.dtype, scalars)
    return run(table.contiguous(), outcome.data_ptr(), scalars, numbers), outcome


class Finish:
    """crd_finish for scalars of these dtypes: its words are packed once, but for the addresses."""

    def __init__(self, kind: Kind, batch: int, dtype: torch.dtype, scalars: Scalars):
        method, *flags, weighting = kind
        self.shape = (batch,) if method == "reward" else ()
        self.dtype = dtype
        self.samples = batch // 2 if method == "dpo" else batch
        words = [METHODS.index(method), *flags, WEIGHTINGS.index(weighting), batch, dtype == torch.float64]
        self._places = [(len(words) + 2 * i, i) for i, t in enumerate(scalars) if t is not None]
        for vector in scalars:
            words += (0, 0) if vector is None else (0, DTYPES[vector.dtype])
        self._template = WORDS(*words)

    def __call__(self, table, outcome: int, scalars: Scalars, numbers: Numbers):
        """The loss. outcome: the address of OUTCOME rows, written."""
        loss = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        words, kept = WORDS.from_buffer_copy(self._template), []
        for place, index in self._places:
            vector = scalars[index].contiguous()  # type: ignore[union-attr]  # those that are given
            words[place] = vector.data_ptr()
            kept.append(vector)
        reals = REALS(*numbers[2:10], numbers.denominator or self.samples)
        build.library().crd_finish(reals, words, table.data_ptr(), loss.data_ptr(), outcome)
        return loss
