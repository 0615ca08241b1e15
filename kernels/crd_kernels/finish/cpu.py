"""What comes after the sums on the CPU: one call of C++ (finish.cpp), else the definition."""

import ctypes

import torch

from ..native import build
from ..native.problem import DTYPES
from ..problem import METHODS, WEIGHTINGS, Kind, Numbers, Scalars
from ..velocity.stats import OUTCOME, Stats
from . import reference


def finish(table, scalars: Scalars, kind: Kind, numbers: Numbers):
    """The loss, () or (B,), and the outcome (OUTCOME, B), from the (ROWS, B) table of statistics."""
    if build.library() is None:
        return reference.finish(Stats(table, 0), scalars, kind, numbers)
    outcome = table.new_empty((OUTCOME, table.shape[1]))
    return run(table.contiguous(), outcome.data_ptr(), scalars, kind, numbers), outcome


def run(table, outcome: int, scalars: Scalars, kind: Kind, numbers: Numbers):
    """The loss. outcome: the address of OUTCOME rows, written."""
    batch = table.shape[1]
    loss = torch.empty((batch,) if kind.method == "reward" else (), dtype=table.dtype)
    samples = numbers.denominator or (batch // 2 if kind.method == "dpo" else batch)
    method, *flags, weighting = kind
    words = [METHODS.index(method), *flags, WEIGHTINGS.index(weighting)]
    words += [batch, table.dtype == torch.float64]
    vectors = [None if t is None else t.contiguous() for t in scalars]
    for vector in vectors:
        words += (0, 0) if vector is None else (vector.data_ptr(), DTYPES[vector.dtype])
    build.library().crd_finish(
        REALS(*numbers[2:10], samples), WORDS(*words), table.data_ptr(), loss.data_ptr(), outcome
    )
    return loss


REALS, WORDS = ctypes.c_double * 9, ctypes.c_int64 * 22
