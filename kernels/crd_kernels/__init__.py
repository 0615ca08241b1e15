"""Fused losses for reward fine-tuning of flow models. Needs torch, and triton for `impl="triton"`."""

from .centering import Coefficients, center
from .crd import CRDLoss, CRDOutput, crd_loss
from .losses import (
    LossOutput,
    awm_coefficients,
    awm_loss,
    diffusion_dpo_loss,
    flow_matching_loss,
    nft_coefficients,
    nft_loss,
)
from .noise import interpolate
from .velocity import Stats, implicit_reward, measure, velocity_grad

__version__ = "0.1.0"

__all__ = [
    "CRDLoss",
    "CRDOutput",
    "Coefficients",
    "LossOutput",
    "Stats",
    "awm_coefficients",
    "awm_loss",
    "center",
    "crd_loss",
    "diffusion_dpo_loss",
    "flow_matching_loss",
    "implicit_reward",
    "interpolate",
    "measure",
    "nft_coefficients",
    "nft_loss",
    "velocity_grad",
]
