"""CUDA's autocast on the CPU: a norm, a power or a sum of bfloat16 is float32 there, bfloat16 here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

# AT_FORALL_FP32 of torch/include/ATen/autocast_mode.h, but for losses and what resizes pictures
TO_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal"),
    *("rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus"),
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm"),
    *("nuclear_norm.dim", "cosine_similarity", "dist", "pdist", "cdist", "renorm", "logsumexp"),
    *("norm.Scalar", "norm.ScalarOpt_dim"),
)
# AT_FORALL_FP32_SET_OPT_DTYPE: of another result's type where the caller names one
RESULT_FLOAT32 = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm"),
    *("linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"),
)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within this context, autocast on the CPU returns the dtypes of autocast on CUDA. Fake tensors as well.

    The rules stand in torch's dispatcher, whoever calls an operator. Not for what is compiled meanwhile.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in (*TO_FLOAT32, *RESULT_FLOAT32):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "AutocastCPU"):
                library.impl(operator, _rule(operator, name in RESULT_FLOAT32), "AutocastCPU")
        yield


def _rule(operator, of_result: bool):
    def call(*args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            if not of_result:
                args, kwargs = tree_map(_widened, (args, kwargs))
            elif _is_narrow(args[0]) and kwargs.get("dtype") is None:
                kwargs = kwargs | {"dtype": torch.float32}
            return operator(*args, **kwargs)

    return call


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _widened(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value
