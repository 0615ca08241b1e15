"""Argument checks. One line each: the argument, what was wanted, what came. Run before any implementation."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def latents(**tensors: Any) -> None:
    """The first is required and sets shape and device; the others match it or are None."""
    (first, lead), *others = tensors.items()
    tensor(first, lead)
    if lead.dim() < 2:
        raise ValueError(f"{first}: expected shape (batch, ...) of rank >= 2, got {tuple(lead.shape)}")
    if lead.numel() == 0:
        raise ValueError(
            f"{first}: expected at least one sample and one element, got shape {tuple(lead.shape)}"
        )
    dtype(first, lead, FLOATS)
    for name, value in others:
        if value is None:
            continue
        tensor(name, value)
        shape(name, value, tuple(lead.shape))
        dtype(name, value, FLOATS)
        device(name, value, lead.device)


def per_sample(
    name: str, value: Any, batch: int, on: torch.device, dtypes: Collection[torch.dtype] = FLOATS
) -> None:
    """A vector with one entry per sample, shape (batch,), on the device `on`."""
    tensor(name, value)
    shape(name, value, (batch,))
    dtype(name, value, dtypes)
    device(name, value, on)


def mask(value: Tensor | None, like: Tensor) -> Tensor | None:
    """A weight per element as a view of the shape of `like`, broadcast along sizes of 1; or None."""
    if value is None:
        return None
    tensor("mask", value)
    wanted = tuple(like.shape)
    if value.dim() != like.dim() or any(n not in (1, size) for n, size in zip(value.shape, wanted)):
        raise ValueError(
            f"mask: expected a shape that broadcasts to {wanted} by sizes of 1, got {tuple(value.shape)}"
        )
    dtype("mask", value, (*FLOATS, torch.bool, torch.uint8))
    device("mask", value, like.device)
    return value.expand(like.shape)


def shape(name: str, value: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(value.shape) != wanted:
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(value.shape)}")


def dtype(name: str, value: Tensor, wanted: Collection[torch.dtype]) -> None:
    if value.dtype not in wanted:
        names = ", ".join(str(d).removeprefix("torch.") for d in wanted)
        raise TypeError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def device(name: str, value: Tensor, wanted: torch.device) -> None:
    if value.device != wanted:
        raise ValueError(f"{name}: expected device {wanted}, got {value.device}")


def choice(name: str, value: object, wanted: Collection[object]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, wanted))}, got {value!r}")


def flag(name: str, value: object) -> None:
    choice(name, value, (True, False))


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
) -> None:
    """A real number inside the bounds given; `infinite` admits inf."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if value != value or (value - value != 0 and not infinite):  # in a form that torch.compile can follow
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name}: expected a number > {above}, got {value}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name}: expected a number >= {at_least}, got {value}")
    if at_most is not None and not value <= at_most:
        raise ValueError(f"{name}: expected a number <= {at_most}, got {value}")


def denominator(value: float | None) -> float:
    """What sums over samples are divided by: a number > 0; 0 stands for their number, where None is given."""
    if value is None:
        return 0.0
    number("denominator", value, above=0)
    return float(value)


def guidance(
    policy: Tensor, ref_cond: Tensor | None, ref_uncond: Tensor | None, guidance_scale: float
) -> Tensor | None:
    """Returns the ref_uncond that is read: None without guidance. guidance_scale is a number."""
    if ref_cond is None:
        if ref_uncond is not None:
            raise ValueError("ref_cond: expected a tensor because ref_uncond is given, got None")
        return None
    if guidance_scale <= 1:
        if ref_uncond is not None:  # unread, and yet a mistake where it is another's
            tensor("ref_uncond", ref_uncond)
            if isinstance(ref_cond, torch.Tensor) and ref_cond.shape == policy.shape:
                shape("ref_uncond", ref_uncond, tuple(policy.shape))
        return None
    if ref_uncond is None:
        raise ValueError(
            f"ref_uncond: expected a tensor because guidance_scale is {guidance_scale}, got None"
        )
    return ref_uncond


def given(**tensors: Tensor | None) -> None:
    """Refuses None where `latents` lets it pass."""
    for name, value in tensors.items():
        tensor(name, value)


def noise_or_seed(noise: Tensor | None, seed: Tensor | None, like: Tensor) -> None:
    """Exactly one of them, the seed with one integer per sample of `like`."""
    if seed is None:
        tensor("noise", noise)
    elif noise is not None:
        raise ValueError(f"seed: expected None because noise is given, got {type(seed).__name__}")
    else:
        per_sample("seed", seed, like.shape[0], like.device, (torch.int64,))
