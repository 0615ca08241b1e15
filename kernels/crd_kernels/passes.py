"""The passes of one implementation over latents of one layout, kept from call to call.

What a call needs to know of its tensors' layout (strides, grids, compiled kernels) is worked out once and
found again by what the tensors look like. `of` is the only entry; an implementation's class has

    Passes(latents, scalars, kind)               raises ValueError where it cannot serve the layout
    .measure(latents, numbers)                   -> table (ROWS, B)
    .forward(latents, scalars, numbers)          -> table (ROWS + OUTCOME, B), loss
    .backward(latents, table, upstream, numbers) -> like policy: the gradient of that loss, times upstream;
                                                    `old` is None unless the kind says `old_term`
    .gradient(latents, (c1, c2, c3), numbers)    -> like policy
"""

import importlib

import torch

from .native import build
from .problem import NOTHING

PLAIN = (torch.Tensor, torch.nn.Parameter)
LIMIT = 512  # layouts kept; a training run has a handful
_PASSES: dict = {}


def signature(latents, scalars) -> tuple | None:
    """What tensors look like to a kernel, or None where they are no plain tensors (fakes, wrappers) or views
    whose memory holds the negative."""
    look: list = [latents[0].device]  # of the others the number is enough: theirs are checked against it
    for t in (*latents, *scalars):
        if t is None:
            look.append(None)
        elif type(t) in PLAIN and not t.is_neg():
            pointer = t.data_ptr()  # null for a meta tensor, whose device has the number of the CPU's
            look += (t.dtype, t.shape, t.stride(), t.get_device(), pointer and pointer & 15 | 16)
        else:
            return None
    return tuple(look)


def known(key):
    """The passes of a layout that has been served before, or None."""
    return _PASSES.get(key)  # never one without a signature


def of(impl, latents, scalars, kind, key=None):
    """The passes for these tensors, made where they are new. key: (impl, kind, signature), where at hand."""
    key = (impl, kind, signature(latents, scalars)) if key is None else key
    passes = _PASSES.get(key)
    if passes is None:
        name = "reference" if impl == "cpu" and build.library() is None else impl
        passes = importlib.import_module(f".velocity.{name}", __package__).Passes(latents, scalars, kind)
        if len(_PASSES) >= LIMIT:
            _PASSES.clear()
        if key[-1] is not None:
            _PASSES[key] = passes
    return passes


def again(impl, latents, kind):
    """(passes, latents) for the gradient of a loss whose tensors may lie otherwise than it found them.

    `old` may be there because it decides what the loss was computed in: it goes where the gradient has no use
    for it.
    """
    look = signature(latents, NOTHING)
    key = impl, kind, look and ("gradient", *look)  # no public call's: nothing was checked
    passes = of(impl, latents, NOTHING, kind, key)
    return passes, latents if kind.old_term else latents._replace(old=None)
