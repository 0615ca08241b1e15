"""Groups that spread over ranks: two gloo processes against one process with all samples."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).parent))

from kernel_oracle import make, relative_error

NAMES = ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group")
SETTINGS = [
    {},
    {"temperature": 0.5, "loss_type": "bce"},
    {"centering": "batch"},
    {"centering": "none"},
    {"kl_beta": 0.3, "reward_adaptive_kl": False},
    {"denominator": 12.0},  # of a step of which these are a part
]


def loss_of(inputs, rows, **settings):
    from crd_kernels import crd_loss

    policy = inputs["policy"][rows].clone().requires_grad_()
    out = crd_loss(policy, *(inputs[name][rows] for name in NAMES[1:]), impl="cpu", **settings)
    out.loss.backward()
    return out.loss.detach(), policy.grad


def rank_main(rank, split, file, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    inputs = make(batch=7, groups=(0, 0, 3, 0, 3, 8, 3))
    rows = slice(0, split) if rank == 0 else slice(split, 7)
    group = dist.group.WORLD
    torch.save([loss_of(inputs, rows, process_group=group, **s) for s in SETTINGS], f"{results}{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("split", [3, 6])
def test_two_ranks_average_to_one_process(tmp_path, split):
    arguments = (split, tmp_path / "store", str(tmp_path / "rank"))
    multiprocessing.spawn(rank_main, arguments, nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    inputs = make(batch=7, groups=(0, 0, 3, 0, 3, 8, 3))
    for index, settings in enumerate(SETTINGS):
        loss, gradient = loss_of(inputs, slice(None), **settings)
        (first_loss, first), (second_loss, second) = (rank[index] for rank in ranks)
        assert relative_error((first_loss + second_loss) / 2, loss) < 1e-12
        assert relative_error(torch.cat([first, second]) / 2, gradient) < 1e-12
        alone, _ = loss_of(inputs, slice(0, split), **settings)
        assert math.isfinite(alone) and not torch.isclose(alone, first_loss, rtol=1e-6, atol=0)


def empty_rank_main(rank, file, results):
    """Rank 1 comes without samples; a step later both have some."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    inputs, group, found = make(batch=4, groups=(0, 0, 3)), dist.group.WORLD, []
    for rows in (slice(0, 4 if rank == 0 else 0), slice(2 * rank, 2 * rank + 2)):
        try:
            found.append(float(loss_of(inputs, rows, process_group=group)[0]))
        except ValueError as error:
            found.append(str(error))
    torch.save(found, f"{results}{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_a_rank_without_samples_ends_the_step_on_every_rank(tmp_path):
    """By name, and without leaving the others waiting."""
    multiprocessing.spawn(empty_rank_main, (tmp_path / "store", str(tmp_path / "rank")), nprocs=2)
    inputs = make(batch=4, groups=(0, 0, 3))
    whole, _ = loss_of(inputs, slice(None))
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    for found in ranks:
        assert found[0] == "process_group: expected at least one sample on every rank, got none on [1]"
    assert (ranks[0][1] + ranks[1][1]) / 2 == pytest.approx(float(whole), rel=1e-12)


class Losses(torch.nn.Module):
    """A model that returns what the loss does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, inputs):
        from crd_kernels import crd_loss

        return crd_loss(self.layer(inputs["policy"]), *(inputs[name] for name in NAMES[1:]), impl="cpu")


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard"])
def test_a_wrapped_module_may_return_the_whole_output(tmp_path, wrapper):
    inputs, gradients = make(batch=4, groups=(0, 0, 3)), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for wrapped in (False, True):
            model = module = Losses()
            if wrapped and wrapper == "fully_shard":
                mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
                dist.fsdp.fully_shard(model, mesh=mesh)
            elif wrapped:
                model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            output = model(inputs)
            output.loss.backward()
            gradients.append(module.layer.weight.grad)
            assert "loss=tensor(" in repr(output) and "old_kl=tensor(" in repr(output)
    finally:
        dist.destroy_process_group()
    plain, found = gradients
    found = found.full_tensor() if wrapper == "fully_shard" else found
    assert relative_error(found, plain) < 1e-12 and plain.abs().max() > 0


def test_scalars_are_checked_in_every_call_over_ranks(tmp_path):
    """Latents that look like those before do not spare the scalars their check."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        inputs, group = make(batch=4, groups=(0, 0, 3)), dist.group.WORLD
        loss_of(inputs, slice(None), process_group=group)
        with pytest.raises(ValueError, match=r"advantage: expected shape \(4,\), got \(3,\)"):
            loss_of(inputs | {"advantage": inputs["advantage"][:3]}, slice(None), process_group=group)
    finally:
        dist.destroy_process_group()
