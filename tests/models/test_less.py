"""What computes less, with real networks: quantized, streamed and checkpointed bases, whole runs."""

import pytest
import torch

from crd_fast.models import streaming
from crd_fast.run.metrics import read_metrics
from crd_fast.train.trainer import Trainer
from tests.models.conftest import short


def trained(run, recipe):
    trainer = Trainer(recipe, run)
    trainer.run()
    return [parameter.detach().clone() for parameter in trainer.weights.trained()], read_metrics(run)


@pytest.mark.parametrize(
    "family, base",
    [
        ("sd3", ()),
        ("flux", ("model.streaming=true",)),
        pytest.param("sd3", ("model.quantization=nf4", "model.streaming=true"), marks=pytest.mark.slow),
        pytest.param("qwen-image", ("model.quantization=int8",), marks=pytest.mark.slow),
        pytest.param("sd3", ("model.method=full", "model.snapshots=host"), marks=pytest.mark.slow),
    ],
)
def test_kept_graphs_change_nothing(tiny, recipe, tmp_path, monkeypatch, family, base):
    """On the device and on the host the same run to the bit; rerun micro-batches differ by rounding."""
    monkeypatch.setattr(streaming, "SMALLEST", 0)
    monkeypatch.setattr("crd_fast.train.kept.SMALLEST", 0)
    settings = (short(family), "train.micro_batch=2", "rollout.samples_per_prompt=4", *base)
    settings += ("train.timesteps=1", "rollout.steps=2")  # two micro-batches of each group all the same
    found = {
        where: trained(tmp_path / where, recipe(tiny(family), *settings, f"train.kept_graphs={where}"))
        for where in ("none", "device", "host")
    }
    weights, records = found["device"]
    for mine, other in zip(weights, found["host"][0], strict=True):
        assert torch.equal(mine, other)
    for record, none in zip(records, found["none"][1], strict=True):
        for name in ("policy_loss", "kl_loss", "grad_norm"):
            assert record[name] == pytest.approx(none[name], rel=1e-3), name


@pytest.mark.parametrize(
    "family, base", [("sd3", ()), pytest.param("flux", ("model.streaming=true",), marks=pytest.mark.slow)]
)
def test_a_part_goes_backward(tiny, recipe, tmp_path, family, base):
    settings = (
        short(family),
        "train.micro_batch=3",
        "rollout.samples_per_prompt=4",
        "train.backward_fraction=0.5",
        "loss.anchor_fraction=0.5",
        "train.skip_equal_groups=true",
        "train.timestep_sampling=by-signal",
        "rollout.solver=ab2",
        *base,
    )
    weights, records = trained(tmp_path / "run", recipe(tiny(family), *settings))
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert len(records) == 2 and all(record["grad_norm"] > 0 for record in records)
