"""The two passes over the latents: per-sample statistics, and the velocity gradient."""

from .api import implicit_reward, measure, velocity_grad
from .stats import Stats

__all__ = ["Stats", "implicit_reward", "measure", "velocity_grad"]
