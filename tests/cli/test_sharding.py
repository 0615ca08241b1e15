"""Full fine-tuning with the weights cut over two processes equals one process with whole ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.plan.planner import Planner
from crd_fast.ranks import check_ranks
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.weights.sharded import check_resumes
from tests.cli.conftest import metrics
from tests.forked import main_of, two_ranks

FULL = ["model.method=full", "rollout.prompts_per_iteration=4", "train.steps_per_iteration=2"]
FULL += ["snapshots.ema=0.9", "evaluate.drift=4.5", "evaluate.features=random"]
# Ranks must meet in every forward: here a rank may have no anchored pair in a micro-batch, groups are more
# than a micro-batch, and of 5 pictures in micro-batches of 2 one rank has a micro-batch less than the other.
UNEVEN = [
    "loss.anchor_fraction=0.2",
    "train.micro_batch=3",
    "rollout.micro_batch=2",
    "evaluate.max_prompts=5",
]


def options(*settings):
    return [item for setting in settings for item in ("--set", setting)]


def tensors(run, iteration):
    return load_file(run / "checkpoints" / f"iteration-{iteration:06d}" / "training.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("snapshots", ["device", "host"])
def test_two_sharded_processes_are_one(inside, small, tmp_path, snapshots):
    settings = [*FULL, *UNEVEN, f"train.checkpointing={str(snapshots == 'device').lower()}"]
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, errors = inside("train", small, *options(*settings), "--output", one)
    assert code == 0, errors
    settings += ["model.sharding=fsdp", f"model.snapshots={snapshots}"]
    runs = two_ranks(tmp_path / "ranks", main_of, ("train", small, *options(*settings), "--output", two))
    for done in runs:
        assert done.returncode == 0, done.stderr[-3000:]
    assert sum(done.stdout.count("report:") for done in runs) == 1

    for expected, found in zip(metrics(one), metrics(two), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    expected, found = tensors(one, 2), tensors(two, 2)
    start = load_file(one / "checkpoints" / "iteration-000001" / "training.safetensors")
    for name in ("policy", "old", "sampler", "ema"):
        names = [key for key in expected if key.startswith(f"weights/{name}/")]
        assert names == [key for key in found if key.startswith(f"weights/{name}/")]
        moved = torch.cat([(expected[key] - start[key]).flatten() for key in names]).norm()
        off = torch.cat([(found[key] - expected[key]).flatten() for key in names]).norm()
        assert moved > 0 and off < 1e-3 * moved, name

    # the policy leaves as from one process, and one process goes on with it
    folders = [run / "checkpoints" / "iteration-000002" / "transformer" for run in (one, two)]
    configs = [(folder / "config.json").read_text() for folder in folders]
    assert configs[0] == configs[1]
    written = load_file(folders[1] / "diffusion_pytorch_model.safetensors")
    assert written.keys() == load_file(folders[0] / "diffusion_pytorch_model.safetensors").keys()
    policy = {key: value for key, value in found.items() if key.startswith("weights/policy/")}
    assert all(torch.equal(written[key.removeprefix("weights/policy/")], policy[key]) for key in policy)
    code, out, errors = inside("eval", two)
    assert code == 0, errors
    overall = [line.split()[3] for line in out.splitlines() if " overall " in line]
    assert overall == [f"{metrics(two)[-1]['eval/overall']:.3f}"]


@pytest.mark.slow
def test_resumed_is_the_same_to_the_bit(small, tmp_path):
    settings = options(*FULL, "model.sharding=fsdp", "train.optimizer=adamw8bit", "evaluate.every=0")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for arguments in (
        ("train", small, *settings, "--output", whole, "--max-iterations", 2),
        ("train", small, *settings, "--output", stopped, "--max-iterations", 1),
        ("train", "--resume", stopped, "--max-iterations", 2),
    ):
        runs = two_ranks(tmp_path / "ranks", main_of, arguments)
        for done in runs:
            assert done.returncode == 0, done.stderr[-3000:]
    said = "".join(done.stdout + done.stderr for done in runs)
    assert "resuming after iteration 1" in said
    assert said.count("changed: train.iterations 1 -> 2") == 1  # not by each process
    assert metrics(stopped) == metrics(whole)
    expected, found = tensors(whole, 2), tensors(stopped, 2)
    assert any(value.dtype == torch.uint8 for value in expected.values())  # moments in 8 bits
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    state = json.loads((stopped / "checkpoints" / "iteration-000002" / "state.json").read_text())
    check_resumes(state, 2, stopped)
    with pytest.raises(UserError, match="made by 2 processes and goes on with as many, got 4"):
        check_resumes(state, 4, stopped)


@pytest.mark.slow
def test_out_of_memory_on_one_rank_ends_all(torchrun, small, tmp_path):
    """The other waits for it within a forward, and cannot be told of another micro-batch."""
    (tmp_path / "full_of_memory.py").write_text("""
import os
import torch
from diffusers import SD3Transformer2DModel

forward, calls = SD3Transformer2DModel.forward, []

def full(self, *args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return forward(self, *args, **kwargs)

SD3Transformer2DModel.forward = full

def reward(images, prompts, metadata):
    return [float(image.mean()) for image in images]
""")
    settings = options(*FULL, "model.sharding=fsdp", "evaluate.every=0")
    settings += options("rewards.full_of_memory:reward=1.0")
    done = torchrun("train", small, *settings, "--output", tmp_path / "run", folder=tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    # the other process says what it lost, and it may be the first to say so
    errors = [line for line in errors if "out of memory" in line]
    assert len(errors) == 1
    assert "out of memory at micro-batch 96, model.sharding fsdp needs the same on all" in errors[0]


def test_a_fixed_micro_batch():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried")
    free, fixed = MicroBatch(8), MicroBatch(8, fixed=True)
    free.halve(error)
    assert free.size == 4
    with pytest.raises(UserError, match=r"micro-batch 8, .*: set smaller micro-batches: CUDA out of memory$"):
        fixed.halve(error)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.method=lora"], "model: sharding: expected none with method lora, got fsdp"),
        (["model.dtype=bf16", "model.snapshots=host"], "model: dtype: expected default with sharding fsdp"),
        (["model.streaming=true"], "model: streaming: expected false with method full"),
        (["model.quantization=nf4"], "model: quantization: expected none with method full"),
    ],
)
def test_what_sharding_cannot_go_with(overrides, message):
    with pytest.raises(UserError, match=message):
        build_recipe({"model": {"method": "full", "sharding": "fsdp"}}, overrides)


def test_one_process_and_its_plan_are_refused():
    recipe = load_recipe("builtin", ["model.sharding=fsdp"])
    check_ranks(recipe, 2)
    with pytest.raises(UserError, match=r"model.sharding: fsdp needs several processes"):
        check_ranks(recipe, 1)
    with pytest.raises(UserError, match=r"model.sharding: a plan is of one process, expected none"):
        Planner(recipe)
