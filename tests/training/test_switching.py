"""Memory that runs out while weights are switched leaves the policy as it was, at whichever tensor."""

from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from crd_fast.errors import UserError
from crd_fast.weights import sharded
from crd_fast.weights.full import FullWeights, HostWeights
from crd_fast.weights.sharded import ShardedHostWeights, ShardedWeights
from tests.training.conftest import gradients
from tests.training.test_weights import lora, network, train_a_little


def small():
    """Of one block: it is tried once for each of its tensors, and then all of them are compared."""
    return network(layers=1)


MAKE = {
    "lora": lora,  # whose targets are not all in a single block
    "full": lambda: FullWeights(small()),
    "host": lambda: HostWeights(small()),
    "host-bf16": lambda: HostWeights(small().bfloat16()),
    "sharded": lambda: ShardedWeights(small()),
    "sharded-host": lambda: ShardedHostWeights(small()),
}
# tensor operations of a switch and back, for each tensor of the policy: where nothing is copied there is
# nothing that memory could run out for. On the host: the policy, which has changed, before the two
OPERATIONS = {"lora": 0, "full": 0, "host": 3, "host-bf16": 3, "sharded": 6, "sharded-host": 3}
BACK = {"lora": 0, "full": 0, "host": 1, "host-bf16": 1, "sharded": 3, "sharded-host": 1}  # of these
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


class OutOfMemory(TorchDispatchMode):
    """Some of the copies, counted from 0, find no memory."""

    def __init__(self, *failing):
        super().__init__()
        self.failing, self.count = failing, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in COPIES:
            self.count += 1
            if self.count - 1 in self.failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def alone(request):
    """A process group of this process, for what is sharded."""
    if not request.node.callspec.params["kind"].startswith("sharded"):
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def changed(weights, before):
    """The names of tensors, of any set, that are not what they were."""
    return [name for name, value in weights.state().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("kind", MAKE)
def test_memory_may_run_out_at_any_tensor_of_a_switch(alone, kind, monkeypatch):
    monkeypatch.setattr(sharded, "SPARE_BYTES", 1 << 20)  # a tensor at once
    weights = MAKE[kind]()
    train_a_little(weights)
    before = {name: value.clone() for name, value in weights.state().items()}
    with OutOfMemory() as counted, weights.use("old"):
        pass
    assert counted.count == OPERATIONS[kind] * len(weights.trained())
    failures = 0
    for place in range(counted.count):
        weights.stepped()  # so that the policy is copied to the host again
        try:
            with OutOfMemory(place), weights.use("old"):
                pass
        except torch.OutOfMemoryError:
            failures += 1
        assert not changed(weights, before), place
    assert failures == counted.count - BACK[kind] * len(weights.trained())  # which is tried again
    with OutOfMemory() as counted, weights.use("old"):
        pass
    for place in range(counted.count):  # of a switch whose policy is on the host already
        with suppress(torch.OutOfMemoryError), OutOfMemory(place), weights.use("old"):
            pass
        assert not changed(weights, before), place
    assert not changed(weights, before)


@pytest.mark.parametrize("kind", MAKE)
def test_memory_may_run_out_within_a_switch(alone, kind):
    weights = MAKE[kind]()
    train_a_little(weights)
    before = {name: value.clone() for name, value in weights.state().items()}
    with pytest.raises(torch.OutOfMemoryError), weights.use("reference"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert not changed(weights, before)


def test_a_policy_that_cannot_be_put_back_ends_the_run():
    """Not as memory that runs out, after which a step would be tried again with whatever is there."""
    weights = HostWeights(network())
    count = len(weights.trained())
    back = 2 * count
    refused = pytest.raises(UserError, match="out of memory while the policy's weights were put back")
    with refused, OutOfMemory(back, back + 1), weights.use("old"):
        pass


def test_exchanged_in_pieces(monkeypatch):
    monkeypatch.setattr(sharded, "SPARE_BYTES", 24)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = ShardedWeights(network())
        train_a_little(weights)
        before = {name: value.clone() for name, value in weights.state().items()}
        with weights.use("old"):
            for name, value in weights.state().items():
                other = {"policy": "old", "old": "policy"}.get(name.partition("/")[0], "sampler")
                assert torch.equal(value, before[f"{other}/{name.partition('/')[2]}"])
        assert not changed(weights, before)
    finally:
        dist.destroy_process_group()


def test_a_step_whose_switch_found_no_memory_is_that_of_half_the_micro_batch(setting, monkeypatch):
    def of_host():
        weights = HostWeights(setting[0].transformer)
        weights.load_state(state)
        return setting[0], weights, *setting[2:]

    state = {name: value.clone() for name, value in setting[1].state().items()}
    _, expected = gradients(of_host(), 4)
    interrupted = of_host()
    weights, failed = interrupted[1], []
    copy_from = weights._copy_from

    def without_memory(name):
        if name == "old" and not failed:
            failed.append(name)
            with OutOfMemory(2):  # after half of the tensors
                copy_from(name)
        copy_from(name)

    monkeypatch.setattr(weights, "_copy_from", without_memory)
    _, found = gradients(interrupted, 8)
    assert failed and torch.equal(found, expected)
    assert all(
        torch.equal(value, state[f"policy/{name}"])
        for name, value in setting[0].transformer.named_parameters()
    )
