"""Noise that is never stored: made from a seed inside the kernels."""

from .api import interpolate

__all__ = ["interpolate"]
