"""Weights and optimizer as a recipe wants them."""

from __future__ import annotations

from typing import Any

import torch

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.base import FlowModel
from crd_fast.models.targets import lora_targets
from crd_fast.weights.base import Weights
from crd_fast.weights.full import FullWeights, HostWeights


def make_weights(model: FlowModel, recipe: Recipe) -> Weights:
    """The policy and its snapshots, as adapters or as whole copies."""
    config, snapshots = recipe.model, recipe.snapshots.names
    if config.sharding == "fsdp":
        from crd_fast.weights.sharded import ShardedHostWeights, ShardedWeights

        sharded = ShardedHostWeights if config.snapshots == "host" else ShardedWeights
        return sharded(model.transformer, snapshots)
    if config.method == "full":
        weights = (HostWeights if config.snapshots == "host" else FullWeights)(model.transformer, snapshots)
        if config.dtype == "bf16":
            from crd_fast.weights.bf16 import widen_gradients

            widen_gradients(weights.trained())
        return weights
    from crd_fast.weights.lora import LoraWeights

    return LoraWeights(
        model.transformer,
        config.lora_rank,
        config.lora_alpha,
        lora_targets(model, recipe),
        recipe.train.seed,
        model.lora_loader,
        model.device,
        snapshots,
    )


def make_optimizer(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    config = recipe.train
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    on_gpu = torch.cuda.is_available()
    if config.optimizer == "paged_adamw8bit" and not on_gpu:
        raise UserError("train.optimizer: paged_adamw8bit needs a CUDA GPU, expected adamw8bit or adamw here")
    if recipe.model.dtype == "bf16":
        from crd_fast.weights import bf16

        optimizer = bf16.ROUNDED[config.optimizer](parameters, **settings)
        optimizer.seed = config.seed
        return optimizer
    if config.optimizer == "adamw":
        # fused, or it would hold the roots of all second moments at once
        return torch.optim.AdamW(parameters, fused=on_gpu, **settings)
    import bitsandbytes as bnb

    from crd_fast.weights.paged import PagedAdamW8bit

    narrow = {"adamw8bit": bnb.optim.AdamW8bit, "paged_adamw8bit": PagedAdamW8bit}
    return narrow[config.optimizer](parameters, **settings)
