"""Processes that are killed while they save: a whole checkpoint is always there, and the next is saved."""

import os
import shutil
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from crd_fast.weights import checkpoint
from tests.fuzz.budget import TRIED, cases
from tests.training.test_checkpoints import WRITES, Policy, save


def killed_at(folder, write, act):
    """Whether a child that does this was killed, which happens before its write of this number."""
    child = os.fork()
    if child == 0:
        left = [write]

        def kill(event, arguments):
            if event in WRITES and str(folder) in " ".join(map(str, arguments)):
                if left[0] == 0:
                    os.kill(os.getpid(), 9)
                left[0] -= 1

        sys.addaudithook(kill)
        act()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@cases(20)
@given(
    write=st.integers(0, 45),
    before=st.integers(1, 3),
    keep=st.integers(1, 2),
    best=st.booleans(),
    again=st.booleans(),
)
def test_there_is_a_whole_checkpoint(tmp_path_factory, write, before, keep, best, again):
    folder = tmp_path_factory.getbasetemp() / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for iteration in range(1, before + 1):
        path = save(folder, iteration, keep=keep)
    if best:
        checkpoint.mark_best(path)
    for _ in range(1 + again):  # the second time over what the first one left
        TRIED["kills while saving"] += killed_at(
            folder, write, lambda: save(folder, before + 1, keep=keep, best=before if best else None)
        )
        found = checkpoint.newest(folder)
        assert checkpoint.iteration_of(found) in (before, before + 1)
        tensors = load_file(found / "training.safetensors")
        expected = Policy(checkpoint.iteration_of(found)).values["policy/w"]
        assert torch.equal(tensors["weights/policy/w"], expected)
    save(folder, before + 2, keep=keep, best=before if best else None)
    assert checkpoint.iteration_of(checkpoint.newest(folder)) == before + 2
    if best:
        assert checkpoint.read_state(checkpoint.find(folder / "best"))["iteration"] == before
