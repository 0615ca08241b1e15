"""Which implementation runs. One asked for by name runs or the call is refused: nothing falls back."""

import importlib.util
import os

import torch

from . import checks

IMPLEMENTATIONS = ("auto", "triton", "cpu", "reference")


try:
    _TRITON = importlib.util.find_spec("triton") is not None
except ValueError:  # an entry of None in sys.modules
    _TRITON = False


def has_triton() -> bool:
    return _TRITON


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def choose(impl: str, device: torch.device) -> str:
    """The name of the implementation for tensors on `device`: never "auto"."""
    checks.choice("impl", impl, IMPLEMENTATIONS)
    if impl == "auto":
        if device.type in ("cuda", "xpu") and has_triton():
            return "triton"
        return "cpu" if device.type == "cpu" else "reference"
    if impl == "triton":
        if not has_triton():
            raise ValueError(
                "impl: expected an implementation that can run here, got 'triton' without triton installed"
            )
        if device.type not in ("cuda", "xpu") and not interpreting():
            raise ValueError(f"impl: expected tensors on a GPU for 'triton', got {device}")
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"impl: expected tensors on the cpu for 'cpu', got {device}")
    return impl
