"""The namespace that the operators of this copy of the package are registered in.

It follows from the name under which the package was imported, so that copies run side by side in one process:
the installed one, one loaded by Hugging Face's `kernels`, one inside another package. kernel-builder replaces
this file by its own with the same two names, whose namespace covers the build.
"""

import re

import torch

_NAMESPACE = re.sub(r"\W", "_", __package__)

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` as torch.library wants it: "namespace::op_name"."""
    return f"{_NAMESPACE}::{op_name}"
