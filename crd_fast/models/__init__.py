"""Flow models, as the trainer sees them. `BuiltinModel` shows the interface."""

from __future__ import annotations

import torch

from crd_fast.config import ModelConfig, TrainConfig
from crd_fast.errors import UserError
from crd_fast.models.builtin import BuiltinModel


def load_model(config: ModelConfig, train: TrainConfig):
    """The model that `model.path` names, on the GPU if there is one.

    Raises UserError if it is none that is supported.
    """
    if config.path != "builtin":
        raise UserError(f"model.path: expected builtin, got {config.path!r}")
    if config.quantization != "none":
        raise UserError(
            f"model.quantization: expected none for the built-in model, got {config.quantization}"
        )
    model = BuiltinModel.load()
    model.transformer.to("cuda" if torch.cuda.is_available() else "cpu")
    if train.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    return model
