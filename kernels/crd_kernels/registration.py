"""Functions as operators of the package's own namespace (`_ops.py`)."""

import torch

_LIBRARY = torch.library.Library("crd_kernels", "FRAGMENT")
NAMESPACE = "crd_kernels"


def register(function):
    """The operator that runs `function`, named as it is without `_op`; its schema comes from the annotations.

    By way of `Library` and not `torch.library.custom_op`, whose wrappers cost each call some ten microseconds
    more. The function must neither mutate its arguments nor return one of them.
    """
    name = function.__name__.removesuffix("_op")
    tags = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=tags)
    _LIBRARY.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def fake(name):
    return torch.library.register_fake(f"{NAMESPACE}::{name}")


def autograd(name, backward, setup_context=None):
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
