"""The losses that users of CRD compare it with, on the same two passes."""

from .awm import awm_coefficients, awm_loss
from .common import LossOutput
from .dpo import diffusion_dpo_loss
from .flow_matching import flow_matching_loss
from .nft import nft_coefficients, nft_loss

__all__ = [
    "LossOutput",
    "awm_coefficients",
    "awm_loss",
    "diffusion_dpo_loss",
    "flow_matching_loss",
    "nft_coefficients",
    "nft_loss",
]
