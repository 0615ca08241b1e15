"""`crd-fast train` and what it leaves, through the real command line."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from crd_fast.models.builtin import WORLD
from tests.cli.conftest import metrics
from tests.forked import crd_fast

NARROW = ["model.method=full", "model.dtype=bf16", "model.snapshots=host", "train.optimizer=adamw8bit"]
REQUIRED = {
    *("iteration", "step", "reward_mean", "reward_std", "implicit_reward_mean", "policy_loss", "kl_loss"),
    *("kl", "old_kl", "old_deviation", "grad_norm", "old_decay", "sampler_decay", "seconds_rollout"),
    *("seconds_reward", "seconds_update", "peak_rss_bytes"),
}


def weights(run, iteration=2):
    return load_file(run / "checkpoints" / f"iteration-{iteration:06d}" / "training.safetensors")


@pytest.mark.slow
def test_a_run_from_training_to_pictures(process, inside, small, tmp_path):
    run = tmp_path / "run"
    code, out, err = process("train", small, "--output", run)
    assert code == 0, err
    assert err == ""
    assert "Held-out prompts, 6 images" in out and "clean" in out and "report.html" in out
    records = metrics(run)
    full = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert [r["iteration"] for r in records] == [0, 1, 2]
    assert not REQUIRED - full.keys()
    assert "eval/overall" in records[0] and "eval/overall" in records[2] and "eval/overall" not in records[1]
    assert (
        records[1]["implicit_reward_mean"] == 0 and records[1]["old_deviation"] == 0
    )  # policy and old start equal
    assert records[2]["old_deviation"] > 0
    for name in (
        "config.yaml",
        "environment.json",
        "report.html",
        "samples/000000.png",
        "samples/000002.png",
    ):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())

    code, _, err = inside("train", small, "--output", run)
    assert code == 2 and "already holds a run" in err and len(err.splitlines()) == 1
    assert metrics(run) == records  # nothing was overwritten

    code, out, err = inside("eval", run)
    assert code == 0, err
    overall = [line.split()[3] for line in out.splitlines() if " overall " in line]
    assert overall == [
        f"{records[2]['eval/overall']:.3f}"
    ]  # the checkpoint holds the weights that were evaluated

    code, out, err = inside(
        "sample", run, "--prompt", "a photo of a red circle", "--out", tmp_path / "grid.png"
    )
    assert code == 0, err
    code, _, err = inside("sample", run, "--prompt", "a photo of a red dog", "--out", tmp_path / "dog.png")
    assert code == 2 and "does not know the word 'dog'" in err
    code, _, err = inside(
        "sample", run, "--prompt", "a photo of a red circle", "--out", tmp_path / "grid.png"
    )
    assert code == 2 and "already exists" in err
    code, out, err = inside("report", run)
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_micro_batch_does_not_change_the_run(inside, no_charts, small, tmp_path, method):
    """Loss, gradient norm and parameters of two iterations, to float32 rounding (arXiv 2603.14128 needs the
    whole group; the memory for it must not)."""
    settings = ["--set", f"model.method={method}", "--set", "evaluate.every=0"]
    runs = {}
    for size in (1, 3, 4, 16):  # one sample, a part of a group, a group, two groups
        run = tmp_path / str(size)
        code, _, err = inside(
            "train", small, "--output", run, "--set", f"train.micro_batch={size}", *settings
        )
        assert code == 0, err
        runs[size] = metrics(run), weights(run)
    expected_metrics, expected_weights = runs[16]
    for size in (1, 3, 4):
        found_metrics, found_weights = runs[size]
        for found, expected in zip(found_metrics, expected_metrics, strict=True):
            for name in ("policy_loss", "kl_loss", "kl", "grad_norm", "reward_mean"):
                assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-9), (size, name)
        for name, expected in expected_weights.items():
            if name.startswith("weights/policy"):
                # Adam divides by the gradient's size: where that is rounding, so is the whole step
                change = (found_weights[name] - expected).abs()
                assert change.median() < 1e-6 and change.max() < 2.1e-3, (size, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [["train.optimizer=adamw"], ["train.optimizer=adamw8bit", "model.method=full"], NARROW]
)
def test_killed_and_resumed_is_the_same_to_the_bit(small, tmp_path, settings):
    options = [item for setting in settings for item in ("--set", setting)] + ["--max-iterations", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = crd_fast(tmp_path / "said", "train", small, "--output", whole, *options).wait()
    assert done.returncode == 0, done.stderr

    running = crd_fast(tmp_path / "said", "train", small, "--output", killed, *options)
    checkpoint = killed / "checkpoints" / "iteration-000002"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and not running.ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "step"')  # killed while writing

    done = crd_fast(tmp_path / "said", "train", "--resume", killed).wait()
    assert done.returncode == 0, done.stderr
    assert metrics(killed) == metrics(whole)
    expected, found = weights(whole, 3), weights(killed, 3)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_bfloat16_weights_follow_float32(inside, no_charts, small, tmp_path):
    """Steps of 1e-4 are below half a unit of most weights: rounded to the nearest they would be lost."""
    found = {}
    for name, settings in {"wide": ["model.method=full"], "narrow": NARROW}.items():
        options = [
            i for s in [*settings, "evaluate.every=0", "train.learning_rate=1.0e-4"] for i in ("--set", s)
        ]
        code, _, err = inside("train", small, "--output", tmp_path / name, *options, "--max-iterations", "4")
        assert code == 0, err
        found[name] = metrics(tmp_path / name)[-4:], weights(tmp_path / name, 4)
    (wide, wide_weights), (narrow, narrow_weights) = found["wide"], found["narrow"]
    # predictions in bfloat16 are right to 2^-8 each; gradients are sums of what is left of differences.
    # Of few samples a processor's way of rounding shows: in one iteration as 18 % of the policy's loss.
    for name, tolerance in {"kl_loss": 0.05, "policy_loss": 0.15, "grad_norm": 0.2}.items():
        one, two = (sum(record[name] for record in records) for records in (wide, narrow))
        assert two == pytest.approx(one, rel=tolerance), name
    assert narrow[0]["implicit_reward_mean"] == 0
    start = load_file(WORLD.folder / "transformer.safetensors")
    along = length = 0.0  # the change in bfloat16 along that in float32
    for name, value in start.items():
        if f"weights/policy/{name}" in wide_weights:
            change = wide_weights[f"weights/policy/{name}"] - value.float()
            rounded = narrow_weights[f"weights/policy/{name}"].float() - value.bfloat16().float()
            along, length = along + float((change * rounded).sum()), length + float((change**2).sum())
    assert along / length == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_in_good_order(small, tmp_path, number):
    run = tmp_path / "run"
    options = ("--max-iterations", "500", "--set", "evaluate.every=0")
    running = crd_fast(tmp_path / "said", "train", small, "--output", run, *options)
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "iteration-000001").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(running.pid, number)
    done = running.wait(120)
    assert done.returncode == 130, done.stderr
    assert "go on with: crd-fast train --resume" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr
    last = metrics(run)[-1]["iteration"]
    assert (run / "checkpoints" / f"iteration-{last:06d}").exists()


def test_a_run_that_is_whole_says_how_to_go_on(inside, no_charts, small, tmp_path):
    run = tmp_path / "run"
    once = ("--max-iterations", 1, "--set", "evaluate.every=0")
    code, _, err = inside("train", small, "--output", run, *once)
    assert code == 0, err
    code, out, err = inside("train", "--resume", run)
    assert code == 0 and "nothing is left after iteration 1; --max-iterations N asks for more" in out, err
    code, out, err = inside("train", "--resume", run, "--max-iterations", 2)
    assert code == 0 and "resuming after iteration 1" in out and "nothing is left" not in out, err
    assert [record["iteration"] for record in metrics(run)] == [1, 2]


@pytest.mark.parametrize("method", ["nft", "awm", "flow_matching"])
def test_other_methods_train_and_report_what_they_measure(inside, small, tmp_path, method):
    settings = (
        f"loss.method={method}",
        "train.micro_batch=3",
        "loss.anchor_fraction=0.5",
        "evaluate.every=0",
    )
    options = [option for setting in settings for option in ("--set", setting)]
    code, _, err = inside("train", small, "--output", tmp_path / "run", "--max-iterations", 1, *options)
    assert code == 0, err
    record = metrics(tmp_path / "run")[-1]
    assert record["grad_norm"] > 0 and record["policy_loss"] != 0
    assert ("old_deviation" in record) == (method == "nft")
    drawn = "Signal of the implicit reward" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert drawn == (method == "nft")


@pytest.mark.parametrize("minutes, saved", [(1e-6, [1, 2]), (1000, [2])])
def test_checkpoints_by_time(inside, no_charts, small, tmp_path, minutes, saved):
    settings = ["checkpoint.every=100", f"checkpoint.minutes={minutes}", "evaluate.every=0"]
    options = [i for s in settings for i in ("--set", s)]
    code, _, err = inside("train", small, "--output", tmp_path / "run", *options, "--max-iterations", "2")
    assert code == 0, err
    found = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in found] == [f"iteration-{i:06d}" for i in saved]
