"""Functions as operators of this copy's own namespace (_ops.py), which nothing else in the package spells."""

from collections.abc import Callable

import torch

from ._ops import add_op_namespace_prefix, ops

_LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")


def register(function: Callable) -> torch._ops.OpOverload:
    """The operator that runs `function`, named as it is without `_op`; its schema comes from the annotations.

    By way of `Library` and not `torch.library.custom_op`, whose wrappers cost each call some ten microseconds
    more. The function must neither mutate its arguments nor return one of them.
    """
    name = function.__name__.removesuffix("_op")
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(ops, name).default


def fake(name: str) -> Callable[[Callable], Callable]:
    """Decorates the function that gives the operator `name` outputs without content, for tracing."""
    return torch.library.register_fake(add_op_namespace_prefix(name))


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the operator `name` a backward; both functions as in `torch.library.register_autograd`."""
    torch.library.register_autograd(add_op_namespace_prefix(name), backward, setup_context=setup_context)
