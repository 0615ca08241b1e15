"""Centering within prompt groups: the part that couples samples, on scalars only."""

from .api import center
from .coefficients import Coefficients

__all__ = ["Coefficients", "center"]
