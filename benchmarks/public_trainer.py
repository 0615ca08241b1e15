"""The public CRD trainer, Flow-Factory's, on the inputs of this one, to be compared with it.

Nothing of it is in this repository: a checkout is imported from where it lies. What computes is its own:
`SD3_5Adapter`, `CRDTrainer.optimize`, and all that they call. Its data, rewards and log files are left out.
Replaced are the timesteps that it draws, by those that are given, and its autocast, which is bfloat16
whatever the precision, by none.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import logging
import sys
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator

# What it imports for video, audio and its data, at the top of its files, where it is not installed.
UNUSED = ("datasets", "imageio", "swanlab", "torchaudio", "wandb")


class _Nothing(ModuleType):
    """A package that is not here: whatever is asked of it is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent:
    """Finds packages of `UNUSED`, after all other finders."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, _Absent, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return _Nothing(spec.name)

    @staticmethod
    def exec_module(module):
        pass


def imported(checkout: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Its modules of the CRD trainer, of SD3's adapter and of the arguments."""
    sys.path.insert(0, str(checkout / "src"))
    sys.meta_path.append(_Absent)
    try:
        names = ("trainers.crd", "models.stable_diffusion.sd3_5", "hparams")
        found = tuple(importlib.import_module(f"flow_factory.{name}") for name in names)
    finally:
        sys.meta_path.remove(_Absent)
        sys.path.pop(0)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("flow_factory") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.WARNING)
    return found  # type: ignore[return-value]


def public_trainer(checkout: Path, pipeline: Path, recipe, timesteps: list[float], folder: Path):
    """Its trainer with the recipe's settings; timesteps: T of every sample, 0 to 1000, in its order.

    The micro-batch is `recipe.train.micro_batch`; an iteration is one optimizer step.
    """
    crd, sd3, hparams = imported(checkout)
    rollout, loss, train, model = recipe.rollout, recipe.loss, recipe.train, recipe.model
    samples = rollout.prompts_per_iteration * rollout.samples_per_prompt
    accumulation = samples // train.micro_batch * len(timesteps)
    arguments = hparams.Arguments.from_dict(
        {
            "mixed_precision": "no",
            "model": {
                "model_name_or_path": str(pipeline),
                "model_type": "sd3-5",
                "finetune_type": "lora",
                "target_modules": "default",
                "master_weight_dtype": "fp32",
                "lora_rank": model.lora_rank,
                "lora_alpha": model.lora_alpha,
            },
            "train": {
                "trainer_type": "crd",
                "resolution": rollout.resolution,
                "per_device_batch_size": train.micro_batch,
                "group_size": rollout.samples_per_prompt,
                "unique_sample_num_per_epoch": rollout.prompts_per_iteration,
                "gradient_accumulation_steps": accumulation,
                "num_inference_steps": rollout.steps,
                "num_train_timesteps": len(timesteps),
                "guidance_scale": rollout.guidance_scale,
                "learning_rate": train.learning_rate,
                "adam_weight_decay": train.weight_decay,
                "max_grad_norm": train.max_grad_norm,
                "enable_gradient_checkpointing": train.checkpointing,
                "latent_storage_dtype": "fp32",
                "ema_decay": 0.0,
                "ref_param_device": "cpu",
                "crd_beta": loss.beta,
                "kl_beta": loss.kl_beta,
                "kl_cfg": loss.guidance_scale,
            },
            "log": {"save_dir": str(folder / "public"), "verbose": False, "logging_backend": "none"},
        }
    )
    accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=accumulation)

    class Trainer(crd.CRDTrainer):
        """Without data, rewards and log files."""

        def _initialization(self) -> None:
            network, self.optimizer = accelerator.prepare(self.adapter.transformer, self._init_optimizer())
            self.adapter.set_component("transformer", network)

        def _init_logging_backend(self) -> None:
            self.logger = None

        def _sample_timesteps(self, batch_size: int) -> torch.Tensor:
            return torch.tensor(timesteps)[:, None].expand(-1, batch_size)

    trainer = Trainer(
        accelerator=accelerator, config=arguments, adapter=sd3.SD3_5Adapter(arguments, accelerator)
    )
    trainer.autocast = contextlib.nullcontext
    return trainer


def set_weights(trainer, policy: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> None:
    """Gives it adapters by the names that `LoraWeights` has for them."""
    own = dict(trainer.adapter.transformer.named_parameters())

    def become(weights: dict[str, torch.Tensor]) -> None:
        for name, value in weights.items():
            key = f"base_model.model.{name}".replace(".weight", ".default.weight")
            own[key].data.copy_(value)

    become(old)
    trainer.adapter.update_named_parameters(trainer._OLD_PARAMS_NAME)
    become(policy)


def samples_of(
    latents: torch.Tensor,  # (N, C, h, w)
    advantage: torch.Tensor,  # (N,)
    embeddings: dict[str, torch.Tensor],  # of P prompts
    empty: dict[str, torch.Tensor],  # of one
) -> list:
    """Its samples, in the order of the latents: all of a prompt, then all of the next."""
    kind = sys.modules["flow_factory.models.stable_diffusion.sd3_5"].SD3_5Sample
    of_prompt = torch.arange(len(latents)) * len(embeddings["states"]) // len(latents)
    return [
        kind(
            all_latents=latent[None],
            prompt_embeds=embeddings["states"][prompt],
            pooled_prompt_embeds=embeddings["pooled"][prompt],
            negative_prompt_embeds=empty["states"][0],
            negative_pooled_prompt_embeds=empty["pooled"][0],
            extra_kwargs={"advantage": value},
        )
        for latent, prompt, value in zip(latents, of_prompt.tolist(), advantage)
    ]


@contextlib.contextmanager
def given_noise(noise: torch.Tensor, micro_batch: int):
    """Within this context its trainer has this noise (N, T, C, h, w) in place of what it draws."""
    crd = sys.modules["flow_factory.trainers.crd"]
    batches = iter([part[:, t] for part in noise.split(micro_batch) for t in range(noise.shape[1])])
    drawn, crd.randn_tensor = crd.randn_tensor, lambda *args, **kwargs: next(batches)
    try:
        yield
    finally:
        crd.randn_tensor = drawn
