"""A run that is stopped within an iteration goes on with the latents that it had."""

import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from crd_fast.config import load_recipe
from crd_fast.run.observer import Observer
from crd_fast.train.partial_rollout import FILE, PartialRollout, digest
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from tests.training.test_stopping import SETTINGS, Signals, records

pytestmark = pytest.mark.usefixtures("all_shallow")


class Rows(Observer):
    """Counts the rows that the sampler is run on."""

    def __init__(self):
        self.sampler = 0

    def branch(self, name, rows):
        self.sampler += rows if name == "sampler" else 0
        return super().branch(name, rows)


def finished(run, *settings, observer=None, resume=False):
    recipe = load_recipe("builtin", [*SETTINGS, "evaluate.every=0", *settings])
    trainer = Trainer(recipe, run, resume=resume, observer=observer or Rows())
    return trainer.run(), trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.weights.trained()])


@pytest.fixture(scope="module", params=["lora", "device", "host"])
def whole(request, tmp_path_factory):
    method = request.param
    settings = (
        ["model.method=lora"] if method == "lora" else ["model.method=full", f"model.snapshots={method}"]
    )
    run = tmp_path_factory.mktemp("partial") / "whole"
    done, trainer = finished(run, *settings)
    assert done and not (run / FILE).exists()
    return settings, weights(trainer), records(run)


@pytest.mark.parametrize("phase, after, made", [("rollout", 4, 4), ("update", 2, 8)])
def test_goes_on_with_what_was_made(whole, tmp_path, caplog, phase, after, made):
    settings, expected, expected_records = whole
    run = tmp_path / "run"
    done, _ = finished(run, *settings, observer=Signals(phase, after, signal.SIGTERM))
    assert not done and f"kept {made} samples of the iteration" in caplog.text
    assert len(load_file(run / FILE)["latents"]) == made

    rows = Rows()
    done, trainer = finished(run, *settings, observer=rows, resume=True)
    assert done and f"going on with {made} samples of this iteration" in caplog.text
    assert rows.sampler == 2 * (2 * 8 - made)  # two steps, of what was left of two iterations
    assert torch.equal(weights(trainer), expected)
    assert records(run) == expected_records
    assert not (run / FILE).exists()


def test_of_other_weights_nothing_is_taken(tmp_path, caplog):
    """The newest checkpoint is gone, and the iteration comes again with a sampler that learnt otherwise."""
    run, rows = tmp_path / "run", Rows()
    done, _ = finished(run, "checkpoint.every=1", observer=ThirdIteration())
    assert not done and (run / FILE).is_file()
    newest = checkpoint.newest(run / "checkpoints")
    newest.rename(tmp_path / "away")
    done, _ = finished(run, "train.learning_rate=1e-2", observer=rows, resume=True)
    assert done and "going on with" not in caplog.text
    assert rows.sampler == 2 * 2 * 8


class ThirdIteration(Signals):
    def __init__(self):
        super().__init__("rollout", 4, signal.SIGTERM)
        self.iterations = -1


@pytest.mark.parametrize("snapshots", ["device", "host"])
def test_what_was_written_while_the_sampler_was_in_use_is_taken(tmp_path, caplog, snapshots):
    """It and the policy, which differ, may have changed places then."""
    run, rows = tmp_path / "run", Rows()
    settings = ["model.method=full", f"model.snapshots={snapshots}", "snapshots.sampler=0/0.5/0/0.5"]
    settings += ["checkpoint.minutes=1e-9", "train.iterations=3"]
    done, _ = finished(run, *settings, observer=ThirdIteration())
    assert not done and (run / FILE).is_file()
    done, _ = finished(run, *settings, observer=rows, resume=True)
    assert done and "going on with 4 samples of this iteration" in caplog.text
    assert rows.sampler == 2 * (8 - 4)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped within a rollout. Its copies are damaged and gone on with."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    done, _ = finished(run, observer=Signals("rollout", 4, signal.SIGTERM))
    assert not done and (run / FILE).is_file()
    return run


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def turned(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def a_folder(path):
    path.unlink()
    path.mkdir()


def of_somebody(path):
    save_file({"mine": torch.ones(2)}, path)


def test_where_prompts_are_cached_says_nothing_of_latents(stopped, tmp_path, caplog):
    """These settings may change when a run goes on."""
    run, rows = shutil.copytree(stopped, tmp_path / "run"), Rows()
    moved = (f"model.prompt_cache={tmp_path / 'cache'}", "model.prompt_cache_gb=3")
    done, _ = finished(run, *moved, observer=rows, resume=True)
    assert done and "going on with 4 samples of this iteration" in caplog.text
    assert rows.sampler == 2 * (2 * 8 - 4)


@pytest.mark.parametrize("damage", [cut, turned, empty, a_folder, of_somebody])
def test_a_damaged_file_is_left_out_and_said(stopped, tmp_path, caplog, damage):
    run, rows = shutil.copytree(stopped, tmp_path / "run"), Rows()
    damage(run / FILE)
    done, _ = finished(run, observer=rows, resume=True)
    assert done and "left out" in caplog.text and "going on with" not in caplog.text
    assert rows.sampler == 2 * 2 * 8


def test_it_is_written_as_time_passes_and_where_it_cannot_be_said(tmp_path, caplog):
    latents = torch.randn(6, 2)
    partial = PartialRollout(tmp_path, 0.0, True)
    assert partial.begin(lambda: "key") is None
    partial.see(latents[:2])
    partial.see(latents[:4])
    assert torch.equal(load_file(tmp_path / FILE)["latents"], latents[:4])
    again = PartialRollout(tmp_path, 0.0, True)
    assert torch.equal(again.begin(lambda: "key"), latents[:4])
    with again.iteration():
        pass
    assert not list(tmp_path.iterdir())

    missing = PartialRollout(tmp_path / "missing", 0.0, True)
    missing.begin(lambda: "key")
    missing.see(latents)
    assert "cannot be written" in caplog.text


def test_a_digest_tells_names_layouts_and_bytes_apart():
    ones = torch.ones(4)
    found = [
        digest({"a": ones}),
        digest({"b": ones}),
        digest({"a": ones.view(2, 2)}),
        digest({"a": ones * 2}),
    ]
    found += [digest({"a": ones.half()}), digest({"a": ones}, 1), digest({})]
    assert len(set(found)) == len(found)
    assert digest({"a": ones, "b": ones}) == digest({"b": ones, "a": ones.clone()})
