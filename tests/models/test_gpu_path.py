"""Training on a GPU that is pretended: every tensor where it belongs, and the numbers of the CPU."""

import pytest
import torch

from crd_fast.config import load_recipe
from crd_fast.models.builtin import BuiltinModel
from crd_fast.models.streaming import Streaming
from crd_fast.run.metrics import MEASURED, read_metrics
from crd_fast.train.trainer import Trainer
from tests.models.conftest import ALL, short
from tests.pretend_gpu import pretend_gpu

SMALL = ("rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4", "rollout.steps=2")
SMALL += (
    "train.iterations=2",
    "train.steps_per_iteration=1",
    "train.timesteps=2",
    "train.precision=fp32",
    "train.optimizer=adamw",
)
SMALL += ("evaluate.every=2", "evaluate.steps=2", "evaluate.max_prompts=2", "checkpoint.every=2")


def trained(recipe, folder):
    trainer = Trainer(recipe, folder)
    trainer.run()
    return trainer


def assert_the_same_on_a_gpu(recipe, folder):
    trained(recipe, folder / "cpu")
    with pretend_gpu():
        trainer = trained(recipe, folder / "gpu")
        assert trainer.model.transformer.device.type == "cuda"
        assert all(parameter.is_cuda for parameter in trainer.weights.trained())
    on_cpu, on_gpu = (read_metrics(folder / name) for name in ("cpu", "gpu"))
    for expected, record in zip(on_cpu, on_gpu, strict=True):
        # the first steps of Adam are signs, which enlarge what rounding does to the smallest gradients
        close = 2e-3 if expected["step"] <= 1 else 0.2
        for name, value in expected.items():
            if not name.startswith(MEASURED):
                assert record[name] == pytest.approx(value, rel=close, abs=1e-3 * close), name
    assert list((folder / "gpu" / "checkpoints").glob("iteration-*/state.json"))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "recipe, overrides",
    [
        (
            "builtin-lora",
            (
                "train.checkpointing=true",
                "train.iterations=1",
                "train.micro_batch=3",
                "loss.anchor_fraction=0.5",
                "evaluate.guided_base=false",
            ),
        ),
        ("builtin", ("model.snapshots=host", "train.micro_batch=8")),
    ],
    ids=("lora", "full"),
)
def test_builtin(recipe, overrides, tmp_path):
    assert_the_same_on_a_gpu(load_recipe(recipe, [*SMALL, *overrides]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_families(tiny, recipe, family, tmp_path):
    assert_the_same_on_a_gpu(
        recipe(tiny(family), short(family), "train.steps_per_iteration=1", "train.timesteps=1"), tmp_path
    )


def test_streamed_blocks():
    """A block finds its weights on the GPU, in the forward and in the recomputation of the backward."""
    sigma, x = torch.tensor([0.9, 0.4]), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def run(device):
        model = BuiltinModel.load()
        model.transformer.enable_gradient_checkpointing()
        streaming = Streaming(model.transformer, device)
        embeddings = {
            key: value.to(device) for key, value in model.encode_prompts(["a red circle", ""]).items()
        }
        latents = x.clone().to(device).requires_grad_()
        velocity = model.velocity(latents, sigma.to(device), embeddings)
        velocity.square().sum().backward()
        assert all(not tensor.is_cuda for tensor in streaming.host_tensors())
        return velocity.detach().cpu(), latents.grad.cpu()

    expected = run(torch.device("cpu"))
    with pretend_gpu():
        found = run(torch.device("cuda"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
