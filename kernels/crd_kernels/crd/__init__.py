"""Centered reward distillation, fused: `crd_loss` and its module."""

from .api import CRDLoss, CRDOutput, crd_loss

__all__ = ["CRDLoss", "CRDOutput", "crd_loss"]
