"""Several checkpoints of one run, damaged in several places: the newest whole one is found, or none is."""

import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.weights import checkpoint
from tests.fuzz.budget import answer, cases
from tests.training.test_checkpoints import FILES, KINDS, save

ITERATIONS = (1, 2, 3)
DAMAGE = st.tuples(st.sampled_from(ITERATIONS), st.sampled_from(FILES))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    for iteration in ITERATIONS:
        save(folder, iteration)
    return folder


@cases(60)
@given(
    damages=st.dictionaries(DAMAGE, st.sampled_from(KINDS), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    put_aside=st.booleans(),
)
def test_the_newest_whole_one_is_found(three, damages, seed, put_aside):
    folder = three.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(three, folder)
    rng = random.Random(seed)
    for (iteration, name), kind in damages.items():
        kind(folder / f"iteration-{iteration:06d}" / name, rng)
    damaged = {iteration for iteration, _ in damages}
    for iteration in damaged:
        path = folder / f"iteration-{iteration:06d}"
        assert answer("damaged checkpoints", checkpoint.find, path) is None, path
    whole = [iteration for iteration in ITERATIONS if iteration not in damaged]
    if not whole:
        assert answer("runs without a whole checkpoint", checkpoint.newest, folder, put_aside) is None
        return
    found = checkpoint.newest(folder, put_aside)
    assert found == folder / f"iteration-{whole[-1]:06d}"
    for iteration in whole:
        assert checkpoint.read_state(folder / f"iteration-{iteration:06d}")["iteration"] == iteration
    if put_aside:
        newer = {iteration for iteration in damaged if iteration > whole[-1]}
        for iteration in newer:
            assert (folder / f"damaged-iteration-{iteration:06d}").is_dir()
