"""A short run, and one optimizer step of a velocity model of a few hundred parameters in float64."""

import shutil

import pytest
import torch

from crd_fast.run.observer import NOBODY
from crd_fast.schema import LossConfig
from crd_fast.seeds import seed_table
from crd_fast.train.pairs import Pairs
from crd_fast.train.trainer import Trainer
from crd_fast.train.update import Updater
from crd_fast.weights.full import FullWeights
from tests.training.short_runs import recipe

PROMPTS, SAMPLES, TIMESTEPS = 2, 6, 2
SHAPE = (3, 4, 4)
NO_MEMORY = [  # as torch says it, on the host too, a library of CUDA's, and the driver
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 20971520 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
]

METHODS = {
    "nft": {"method": "nft", "beta": 0.5},
    "nft plain": {"method": "nft", "adaptive_weighting": False, "guidance_scale": 1.0},
    "awm": {"method": "awm", "weighting": "t"},
    "awm clipped": {"method": "awm", "weighting": "huber", "clip_range": 0.02, "old_kl_beta": 0.3},
    "awm held": {"method": "awm", "old_kl_beta": 0.3, "kl_beta": 0.0},
    "flow matching": {"method": "flow_matching"},
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A short run that is looked at, and copied before anything of it is changed."""
    run = tmp_path_factory.mktemp("resuming") / "run"
    assert Trainer(recipe(), run).run()
    return run


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy", symlinks=True)


class TinyModel:
    """A velocity model of a few hundred parameters that counts the samples it is run on."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer = torch.nn.Sequential(
            torch.nn.Linear(48 + 1 + 5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 48)
        )
        self.transformer.double()
        self.samples_run = {True: 0, False: 0}  # with and without gradient

    def velocity(self, x, sigma, embeddings):
        self.samples_run[torch.is_grad_enabled()] += len(x)
        inputs = torch.cat(
            [x.flatten(1).double(), sigma[:, None].double(), embeddings["states"].double()], dim=1
        )
        return self.transformer(inputs).view_as(x)


@pytest.fixture
def setting():
    model = TinyModel()
    weights = FullWeights(model.transformer)
    with torch.no_grad():  # four different sets of weights
        for parameter in weights.trained():
            parameter.add_(0.1 * torch.randn_like(parameter))
        weights.blend("old", 0.4)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(PROMPTS * SAMPLES, *SHAPE, generator=generator)
    embeddings = {"states": torch.randn(PROMPTS, 5, generator=generator)}
    empty = {"states": torch.zeros(1, 5)}
    groups = PROMPTS * TIMESTEPS
    sample = torch.cat(
        [torch.arange(SAMPLES) + p * SAMPLES for p in range(PROMPTS) for _ in range(TIMESTEPS)]
    )
    pairs = Pairs.plain(
        sample=sample,
        prompt=sample // SAMPLES,
        sigma=torch.tensor([0.9, 0.4]).repeat(PROMPTS).repeat_interleave(SAMPLES),
        seed=seed_table(3, count=groups * SAMPLES),
        group=torch.arange(groups).repeat_interleave(SAMPLES),
        advantage=3 * torch.randn(PROMPTS * SAMPLES, generator=generator)[sample],
        anchor=torch.ones(groups * SAMPLES),
    )
    return model, weights, pairs, latents, embeddings, empty


def gradients(setting, micro_batch, pairs=None, observer=NOBODY, updater=None, **loss):
    model, weights, all_pairs, latents, embeddings, empty = setting
    config = LossConfig(**{"beta": 5.0, "kl_beta": 0.1, "guidance_scale": 4.5, "impl": "reference"} | loss)
    updater = Updater(
        model,
        weights,
        config,
        advantage_clip=5.0,
        precision="fp32",
        micro_batch=micro_batch,
        observer=observer,
        **updater or {},
    )
    model.transformer.zero_grad(set_to_none=True)
    model.samples_run = {True: 0, False: 0}
    metrics = updater.accumulate(all_pairs if pairs is None else pairs, latents, embeddings, empty)
    return metrics, torch.cat([p.grad.flatten() for p in weights.trained()])
