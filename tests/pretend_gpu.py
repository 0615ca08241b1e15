"""A GPU that is none: CPU tensors that say they are on `cuda:0`, so that the GPU's code paths run anywhere.

Operators compute on the CPU tensor inside. What a GPU would refuse is refused: an operator with tensors of
both devices, `numpy()` of a tensor on the GPU. What would make the host wait is written down: a tensor's
value looked at, a copy between the devices, an operator whose result's shape depends on values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# the result's shape, or the way the caller takes, depends on values
DATA_DEPENDENT = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.unique_consecutive,
    aten._unique2,
    aten.unique_dim,
    aten.repeat_interleave,
}
COPIES = {aten._to_copy, aten.copy_, aten._copy_from}
INDEXING = {aten.index, aten.index_put, aten.index_put_}  # take indices from the host, at the price of a copy


class OnGpu(torch.Tensor):
    """Holds `inner`, a CPU tensor. To torch's C++ it is on the meta device, to Python on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda, is_cpu, is_meta = True, False, False
    device = property(lambda self: GPU)

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool | None = None):
        """requires_grad: where accelerate makes a parameter, by the class of another."""
        if requires_grad is not None:
            return torch.nn.Parameter(inner, requires_grad)
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)
        made.inner = inner.resolve_conj()  # a wrapper has no conjugate bit
        return made

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert isinstance(value, OnGpu), f"data: expected a tensor on {GPU}, got one on {value.device}"
        self.inner = value.inner

    def numpy(self, **_):
        raise TypeError("numpy: expected a tensor on the host, got one on cuda:0")

    def record_stream(self, stream) -> None:
        pass

    def new_tensor(self, data, dtype=None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=GPU)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_) -> str:
        return f"OnGpu({self.inner!r})"

    def __reduce_ex__(self, protocol):
        raise TypeError("a tensor on cuda:0 is not to be pickled")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, syncs=[])


class PretendGpu(TorchDispatchMode):
    """Within this context `cuda` exists. `syncs`: operators so far for which the host would have waited."""

    def __init__(self):
        super().__init__()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.syncs)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """`PretendGpu`, and torch.cuda as it would answer."""
    patches = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "device": lambda device: contextlib.nullcontext(),
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "get_device_name": lambda *_: "pretended",
        "get_device_capability": lambda *_: (9, 0),
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **patches))
        stack.enter_context(mock.patch.multiple(torch.Tensor, to=_to, cuda=lambda self: _to(self, GPU)))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _made_then_moved(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device="cpu": _GENERATOR("cpu")))
        yield stack.enter_context(PretendGpu())


class _Stream:
    """A stream or an event: what is pretended runs in order."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, stream):
        pass

    wait_event = record = wait_stream

    def record_event(self):
        return _Stream()


_TO, _GENERATOR = torch.Tensor.to, torch.Generator


def _to(self: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`Tensor.to`, whose C++ refuses a GPU that is none before it asks anybody."""
    parsed = {key: value for key, value in kwargs.items() if key != "copy"}
    device, dtype, *_ = torch._C._nn._parse_to(*args, **parsed)
    if device is None or device.type != "cuda":
        return _TO(self, *args, **kwargs)
    value = _TO(self, dtype) if dtype else self
    return value if isinstance(self, OnGpu) else _ToGpu.apply(value)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return torch.empty_like(value, device=GPU).copy_(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cpu()


def _made_then_moved(make):
    def made(data, *args, device=None, **kwargs):
        value = make(data, *args, **kwargs)
        return value if device is None else value.to(device)

    return made


def _run(func, args, kwargs, syncs: list[str]):
    packet = func._overloadpacket
    tensors = [t for t in tree_leaves((_on_device(func, args), kwargs)) if isinstance(t, torch.Tensor)]
    on_gpu = [isinstance(t, OnGpu) for t in tensors]
    wanted = kwargs.get("device")
    # "meta" is what torch's own C++ asks for where it makes a tensor beside one of these
    to_gpu = any(on_gpu) if wanted is None else torch.device(wanted).type in ("cuda", "meta")
    if packet is aten.copy_:
        to_gpu = on_gpu[0]
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if packet is aten._pin_memory:
        return args[0].clone()
    if not any(on_gpu) and not to_gpu:
        return func(*args, **kwargs)

    mixed = any(on_gpu) and any(not on and t.dim() > 0 for on, t in zip(on_gpu, tensors))
    crosses = packet in COPIES and tensors and on_gpu[-1] != to_gpu
    if mixed and not (packet in COPIES or (packet in INDEXING and on_gpu[0])):
        devices = [GPU if on else t.device for on, t in zip(on_gpu, tensors)]
        raise RuntimeError(f"{func}: expected all tensors on one device, got {devices}")
    if crosses or mixed or (any(on_gpu) and (packet in DATA_DEPENDENT or _masked(packet, args))):
        syncs.append(str(func))

    def unwrap(value):
        return value.inner if isinstance(value, OnGpu) else value

    def wrap(value):
        return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value

    inner = tree_map(unwrap, (args, kwargs))
    if wanted is not None:
        inner[1]["device"] = "cpu"
    if func.namespace == "crd_kernels":  # the kernels for a GPU cannot run; their definition can
        inner = tree_map(lambda value: "reference" if value == "triton" else value, inner)
    result = func(*inner[0], **inner[1])
    if not to_gpu:
        return result
    return return_and_correct_aliasing(func, args, kwargs, tree_map(wrap, result))


def _on_device(func, args):
    """Without the numbers of a loss, which are on the host by design."""
    if func.namespace != "crd_kernels":
        return args
    return [arg for arg, declared in zip(args, func._schema.arguments) if declared.name != "numbers"]


def _masked(packet, args) -> bool:
    """Indexing by a mask: how much comes out depends on it."""
    if packet not in INDEXING:
        return False
    return any(isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1])
