"""Functions as operators of this copy's own namespace (_ops.py), which nothing else in the package spells."""

from collections.abc import Callable

import torch

from ._ops import add_op_namespace_prefix, ops

_LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")


def register(function: Callable) -> torch._ops.OpOverload:
    """The operator that runs `function`, named as it is without `_op`; its schema comes from the annotations.

    By way of `Library` and not `torch.library.custom_op`, whose wrappers cost each call some ten microseconds
    more. The function must neither mutate its arguments nor return one of them. Dynamo sees the operator,
    never the function's body or what that calls.
    """
    name = function.__name__.removesuffix("_op")
    schema = name + torch.library.infer_schema(function, mutates_args=())
    # A CUDA graph would keep the numbers that a loss had when it was captured: torch.compile leaves them out.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    _LIBRARY.define(schema, tags=() if unsafe is None else (unsafe,))
    _LIBRARY.impl(name, _opaque(function), "CompositeExplicitAutograd")
    return getattr(ops, name).default


def fake(name: str) -> Callable[[Callable], Callable]:
    """Decorates the function that gives the operator `name` outputs without content, for tracing."""
    return torch.library.register_fake(add_op_namespace_prefix(name))


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the operator `name` a backward; both functions as in `torch.library.register_autograd`."""
    torch.library.register_autograd(add_op_namespace_prefix(name), backward, setup_context=setup_context)


def _opaque(function: Callable) -> Callable:
    """`function`, skipped by Dynamo together with all that it calls.

    An operator that is called between two graphs runs as Python that Dynamo would compile. The graph would
    own the tensors whose addresses the body hands to C, and free them before the call.

    The mark is on the code object: it costs a call nothing, and needs no import of Dynamo. torch has it for
    itself alone; where it is gone, the wrapper that torch puts around its own custom operators serves.
    """
    try:
        eval_frame = torch._C._dynamo.eval_frame
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):
        return torch._disable_dynamo(function)
    return function
