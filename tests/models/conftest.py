"""Tiny pipelines of the real classes, built once, and recipes small enough for them."""

import contextlib
import itertools

import pytest
import torch
from crd_kernels.native import build
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from crd_fast.config import build_recipe
from crd_fast.seeds import seed_table
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.pairs import Pairs
from crd_fast.train.rollout import Sampling, generate
from tools.make_tiny_pipeline import FAMILIES, make_tiny_pipeline

RESOLUTION, STEPS = 64, 3
PROMPTS = ["a red circle", "two blue squares on a green table"]
GUIDANCE = 4.5
# what the pipelines call guidance by the empty prompt of strength w
GUIDED = {
    "sd3": lambda w: {"guidance_scale": w},
    "flux": lambda w: {"true_cfg_scale": w, "negative_prompt": [""] * 3},
    "flux2-klein": lambda w: {"guidance_scale": w},
    "qwen-image": lambda w: {"true_cfg_scale": w, "negative_prompt": [""] * 3},
    "z-image": lambda w: {"guidance_scale": w - 1},
    "sana": lambda w: {"guidance_scale": w},
}


# room for the prompts here: to the hundreds of tokens that pipelines pad them to a tiny network attends for
# longer than to all the rest. Others do not pad, or put a template before the prompt
TEXT_LENGTH = {"sd3": 40, "flux": 40, "sana": 40, "flux2-klein": 128}


def short(family):
    """The override for it, where whole prompts and their padding are not what is tested."""
    return f"model.text_length={TEXT_LENGTH.get(family, 'default')}"


def as_short(family):
    """The same for the family's pipeline."""
    return {"max_sequence_length": TEXT_LENGTH[family]} if family in TEXT_LENGTH else {}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a family's tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(family):
        if not (folder / family).exists():
            make_tiny_pipeline(family, folder / family)
        return folder / family

    return make


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Prompts are cached in a folder of their own; the losses' C++, once compiled, stays where it is."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(OSError):  # of who has no home
            patch.setenv("CRD_KERNELS_CACHE", str(build.cache_directory()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def recipe(prompts_file):
    """A recipe for the pipeline in a folder, with overrides as on the command line."""

    def build(folder, *overrides):
        values = {
            "model": {"path": str(folder), "lora_rank": 4, "lora_alpha": 8},
            "rollout": {
                "prompts": str(prompts_file),
                "prompts_per_iteration": 2,
                "samples_per_prompt": 3,
                "steps": STEPS,
                "resolution": RESOLUTION,
            },
            "rewards": {"tests.models.conftest:brightness": 1.0},
            "loss": {"guidance_scale": GUIDANCE, "beta": 10.0},
            "snapshots": {"old": "0/0.25/0.005/0.999", "sampler": "0/0/0.1/0.9"},
            "train": {
                "iterations": 2,
                "timesteps": 2,
                "micro_batch": 3,
                "optimizer": "adamw",
                "learning_rate": 0.01,
                "precision": "fp32",
            },
            "evaluate": {"every": 0, "prompts": str(prompts_file)},
            "checkpoint": {"every": 2},
        }
        return build_recipe(values, overrides)

    return build


def brightness(images, prompts, metadata):
    """A reward."""
    return [float(image.mean()) / 255 for image in images]


def load_pipeline(folder):
    """The pipeline as a user loads it. Sana's solver is replaced by Euler steps with its shift."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe.scheduler, DPMSolverMultistepScheduler):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    return pipe


GROUP = 4


def pairs_of_two_prompts(anchor=None):
    """Two groups, by default all anchored."""
    count = 2 * GROUP
    return Pairs.plain(
        sample=torch.arange(count),
        prompt=torch.arange(2).repeat_interleave(GROUP),
        sigma=torch.tensor([0.9, 0.4]).repeat_interleave(GROUP),
        seed=seed_table(3, count=count),
        group=torch.arange(2).repeat_interleave(GROUP),
        advantage=torch.linspace(-2, 2, count),
        anchor=torch.ones(count) if anchor is None else anchor,
    )


def round_by_place(network, by_call=False):
    """From now on equal rows leave the network unequal, a rounding step apart for each place in the batch.

    No BLAS promises otherwise, and some do so; here all do. by_call: nor are two calls equal. Returns what
    takes it back.
    """
    calls = itertools.count() if by_call else itertools.repeat(0)

    def put_apart(module, args, output):
        steps = 1 + next(calls) + torch.arange(len(output[0]), device=output[0].device)
        steps = steps.view(-1, *[1] * (output[0].ndim - 1))
        eps = torch.finfo(output[0].dtype).eps
        return (output[0] * (1 + eps * steps).to(output[0].dtype), *output[1:])

    return network.register_forward_hook(put_apart)


SAMPLE_PROMPTS, SEEDS = (0, 0, 1), (11, 12, 13)


@torch.no_grad()
def by_pipeline(pipe, family, guidance_scale=1.0, **more):
    """Images and the last latents, as the transformer had them, of three samples by the pipeline itself.

    more: what else it is given.
    """
    latents = {}

    def keep(pipe, step, timestep, values):
        latents.update(values)
        return values

    settings = GUIDED[family](guidance_scale) | more
    if family == "sana":
        settings["use_resolution_binning"] = False
        if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            settings["sigmas"] = [1 - i / STEPS for i in range(STEPS)]
    images = pipe(
        prompt=[PROMPTS[i] for i in SAMPLE_PROMPTS],
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=STEPS,
        output_type="pt",
        callback_on_step_end=keep,
        **settings,
    ).images
    return images.permute(0, 2, 3, 1), latents["latents"]


def by_rollout(model, guidance_scale=1.0, micro_batch=3):
    """The same three samples by ours."""
    latents = generate(
        model,
        model.encode_prompts(PROMPTS),
        torch.tensor(SAMPLE_PROMPTS),
        torch.tensor(SEEDS),
        Sampling(
            RESOLUTION, STEPS, guidance_scale, "fp32", model.encode_prompts([""]), MicroBatch(micro_batch)
        ),
    )
    return model.decode(latents), latents


def packed(pipe, latents):
    """As the pipeline hands latents to its transformer."""
    if not hasattr(pipe, "_pack_latents"):
        return latents
    if "Flux2" in type(pipe).__name__:
        return pipe._pack_latents(latents)
    return pipe._pack_latents(latents, *latents.shape)


ALL = list(FAMILIES)
