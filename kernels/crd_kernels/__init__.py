"""Fused losses for reward fine-tuning of flow models. Needs torch, and triton for `impl="triton"`."""

from .centering import Coefficients, center
from .crd import CRDLoss, CRDOutput, crd_loss
from .noise import interpolate
from .velocity import Stats, measure, velocity_grad

__version__ = "0.1.0"

__all__ = [
    "CRDLoss",
    "CRDOutput",
    "Coefficients",
    "Stats",
    "center",
    "crd_loss",
    "interpolate",
    "measure",
    "velocity_grad",
]
