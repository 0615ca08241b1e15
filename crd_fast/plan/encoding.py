"""What it takes to encode prompts, before anything else is loaded."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from crd_fast.models.base import FlowModel
from crd_fast.models.components import count_parameters
from crd_fast.models.pipeline import PipelineModel
from crd_fast.plan.blocks import Blocks
from crd_fast.plan.fake_models import Unknown, fake_encoders
from crd_fast.plan.forwards import Flops
from crd_fast.plan.live_bytes import LiveBytes, Peak, tensors_of


def encoding(model: FlowModel, mode: FakeTensorMode) -> tuple[Peak | None, int]:
    """All text encoders at once, and one prompt through each: their peak, and how many numbers they have.
    Remembered, as few settings of a recipe change it."""
    if not isinstance(model, PipelineModel):
        return None, 0
    key = model.folder, model.dtype, tuple(sorted(model.text_encoders().items()))
    if key not in _ENCODINGS:
        _ENCODINGS[key] = _encoding(model, mode)
    return _ENCODINGS[key]


_ENCODINGS: dict[tuple, tuple[Peak | None, int]] = {}


def _encoding(model: PipelineModel, mode: FakeTensorMode) -> tuple[Peak | None, int]:
    encoders = fake_encoders(model, mode)
    if not encoders:
        return None, 0
    numbers = sum(count_parameters(encoder) for encoder, _ in encoders.values())
    live = LiveBytes()
    live.move([tensors_of(encoder) for encoder, _ in encoders.values()], "text encoders")
    with Unknown(), live, live.in_phase("encode"), torch.no_grad():
        for encoder, tokens in encoders.values():
            for layers in encoder.modules():
                if isinstance(layers, nn.ModuleList):
                    Blocks(list(layers), mode, live, Flops())
            encoder(input_ids=torch.ones(1, tokens, dtype=torch.int64), output_hidden_states=True)
    return live.peaks["encode"], numbers
