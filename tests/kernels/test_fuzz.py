"""A few cases of fuzz.py, so that it stays alive; it is run by hand for thousands."""

import random

import pytest
import torch
from fuzz import Wrong, compare, fuzz, run
from fuzz_draw import draw

CASES = 40
SHARE = {"cpu": 24, "reference": 8, "triton": 8}


def test_random_calls_agree_with_the_oracle(impl):
    """Threads and forks are for the script."""
    assert fuzz(SHARE[impl], 20, impl, small=impl == "triton", threads=False, fork=False) == []


@pytest.mark.parametrize("name", ["loss", "grad"])
def test_a_wrong_number_is_seen(name):
    """One part in a thousand, in most of the cases that have a gradient and are finite."""
    seen = tried = 0
    for number in range(CASES):
        case = draw(random.Random(f"7/{number}"), small=True)
        found = run(case, "reference")
        if name not in found or not found[name].isfinite().all() or found[name].abs().max() < 1e-30:
            continue
        tried += 1
        found[name] = found[name] * (1.001 if found[name].dtype in (torch.float32, torch.float64) else 1.02)
        try:
            compare(case, found, case.tensors)
        except Wrong as error:
            assert str(error).startswith(name)
            seen += 1
    assert tried > CASES / 2 and seen > 0.8 * tried
