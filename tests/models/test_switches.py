"""Attention backends and torch.compile: switches that change how fast, not what."""

import pytest
import torch

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.models import compile_blocks, load_model
from crd_fast.run.metrics import read_metrics
from crd_fast.train.trainer import Trainer
from tests.models.conftest import by_rollout


def test_the_native_backend_draws_the_same(tiny, recipe):
    latents = []
    for backend in ("default", "native"):
        model = load_model(recipe(tiny("flux"), f"model.attention={backend}"))
        latents.append(by_rollout(model)[1])
    torch.testing.assert_close(*latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "backend", "message"),
    [
        ("flux", "nativ", r"model.attention: nativ: .*must be one of"),
        ("flux", "flash", r"model.attention: flash: .*flash"),
        ("sd3", "native", r"model.attention: expected default for SD3Transformer2DModel"),
    ],
)
def test_a_backend_that_cannot_be_used_is_refused(tiny, recipe, family, backend, message):
    if backend == "flash" and torch.cuda.is_available():
        pytest.skip("flash-attn may be installed beside a GPU")
    with pytest.raises(UserError, match=message):
        load_model(recipe(tiny(family), f"model.attention={backend}"))


def test_compiled_blocks_train_as_eager_ones(tmp_path, monkeypatch):
    """Traced and run by torch's own kernels: generating code for every set of weights takes minutes."""
    compiled = []

    def traced(network):
        compiled.append(network)
        compile_blocks(network, backend="aot_eager")

    monkeypatch.setattr("crd_fast.train.trainer.compile_blocks", traced)
    settings = ["rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4", "rollout.steps=2"]
    settings += ["train.timesteps=1", "train.iterations=2", "evaluate.every=0"]
    records = {}
    for switch in (False, True):
        run = tmp_path / str(switch)
        Trainer(load_recipe("builtin", [*settings, f"train.compile={switch}"]), run).run()
        records[switch] = read_metrics(run)
    assert len(compiled) == 1
    for eager, other in zip(records[False], records[True], strict=True):
        for name in ("reward_mean", "kl", "kl_loss", "policy_loss", "grad_norm"):
            assert other[name] == pytest.approx(eager[name], rel=5e-3), name
