"""Models of fake tensors: the real classes, built from configs alone, with shapes and dtypes but no memory.

The fakes say that they are on the CPU. What a GPU would have beside them is not modelled here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models import FAMILIES, check_builtin, checks, family, family_of, prepare_builtin
from crd_fast.models.base import FlowModel
from crd_fast.weights.full import FullWeights
from crd_fast.worlds import WORLDS

if TYPE_CHECKING:
    from crd_fast.models.pipeline import PipelineModel

INITIALIZERS = (
    "kaiming_uniform_",
    "xavier_uniform_",
    "uniform_",
    "normal_",
    "trunc_normal_",
    "zeros_",
    "ones_",
)
NEW_PARAMETER = nn.Parameter.__new__
CONFIGS = Path(__file__).parents[1] / "models" / "configs"


class Unknown(TorchDispatchMode):
    """A fake tensor has no value to branch on or to log; within this context it is 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.0
        return func(*args, **(kwargs or {}))


@contextmanager
def fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Within this context every new tensor is a fake one, and modules are moved by replacing parameters.

    Nothing is initialized: there are no values, and to draw them takes as long as all the rest. Nor are
    adapters moved to where they are already; their dtype is set after that.
    """
    unchanged: dict[str, Any] = dict.fromkeys(INITIALIZERS, _unchanged)
    with (
        mock.patch.object(nn.Module, "_apply", _replace),
        mock.patch.multiple(nn.init, **unchanged),
        mock.patch.object(nn.Parameter, "__new__", _parameter),
        mock.patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", _unchanged),
        mode,
    ):
        yield


def unswitched() -> AbstractContextManager:
    """Within this context sets of weights do not change places: of fakes one is like another."""
    return mock.patch.object(FullWeights, "_put", _unchanged)


def _unchanged(it: Any, *args: object, **kwargs: object) -> Any:
    return it


def _parameter(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
    """As nn.Parameter, which detaches a fake tensor first: an eighth of the time until a plan begins."""
    if not isinstance(data, FakeTensor) or data.requires_grad:
        return NEW_PARAMETER(cls, data, requires_grad)
    data.requires_grad_(requires_grad)._is_param = True  # type: ignore[attr-defined]
    return data


def _replace(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """As nn.Module._apply, which cannot exchange the content of a fake parameter."""
    for child in module.children() if recurse else ():
        _replace(child, function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            new = function(parameter)
        if new is not parameter:
            module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def config_folder(path: str) -> Path:
    """The folder with the configs of `model.path`: its own, or those that ship for a name or a hub id."""
    if Path(path).is_dir():
        return Path(path)
    if (CONFIGS / path).is_dir():
        return CONFIGS / path
    for pipeline in FAMILIES:
        found: Any = family(pipeline)
        if path in found.configs:
            return CONFIGS / found.configs[path]
    names = ", ".join([*WORLDS, *shipped()])
    raise UserError(
        f"model.path: no configs of {path!r} here; a plan knows {names}, their hub ids, and folders of "
        f"diffusers pipelines"
    )


def shipped() -> list[str]:
    """Models whose configs ship with the package."""
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def fake_model(recipe: Recipe, mode: FakeTensorMode) -> FlowModel:
    """The recipe's model on fake tensors, as `load_model` makes it on real ones."""
    if recipe.model.path in WORLDS:
        return _fake_builtin(recipe, mode)
    folder = config_folder(recipe.model.path)
    cpu = torch.device("cpu")
    model = family_of(str(folder), checks.read_index(folder))(folder, recipe, cpu)
    checks.check_sizes(model, recipe)

    def without_weights(component: str, dtype: torch.dtype) -> nn.Module:
        cls = model.component_class(component)
        network = cls.from_config(cls.load_config(folder, subfolder=component))
        return nn.Module.to(network, dtype)

    model.pretrained = without_weights  # type: ignore[method-assign]
    with fakes(mode):
        model.load(recipe.train.checkpointing, quantize=_quantize)
    return model


def _fake_builtin(recipe: Recipe, mode: FakeTensorMode) -> FlowModel:
    from crd_fast.models.builtin import KINDS, BuiltinModel, make_transformer

    check_builtin(recipe)
    kind = KINDS[recipe.model.path]
    with fakes(mode):
        network: Any = make_transformer(kind)
        transformer = network.requires_grad_(False).eval()
    model = BuiltinModel(kind, transformer, None, None)
    with fakes(mode):
        prepare_builtin(model, recipe, torch.device("cpu"))
    return model


def fake_embeddings(model: FlowModel, prompts: int, mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """What `encode_prompts` returns for prompts of the greatest length.

    Lengths and masks are real: the models read them.
    """
    embeddings = model.longest_embeddings(prompts)
    with mode:
        fake = {key: torch.empty(v.shape, dtype=v.dtype) for key, v in embeddings.items() if v.is_meta}
    return embeddings | fake


def fake_encoders(model: PipelineModel, mode: FakeTensorMode) -> dict[str, tuple[nn.Module, int]]:
    """The pipeline's text encoders, each with the number of tokens it reads."""
    import transformers
    from transformers.initialization import no_init_weights

    encoders = {}
    for name, (kind, tokens) in model.text_encoders().items():
        config = transformers.AutoConfig.from_pretrained(model.folder / name)
        if hasattr(config, "projection_dim") and hasattr(config, "text_config"):
            config = config.text_config
        with fakes(mode), no_init_weights():  # they have initializers of their own
            encoder = getattr(transformers, kind)(config).to(model.dtype).eval()
        encoders[name] = encoder, tokens
    return encoders


@unset_fake_temporarily()  # what bitsandbytes makes beside the weights is real, and kept for later use
def _quantize(
    network: nn.Module,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    keep: tuple[str, ...] = (),
    home: torch.device | None = None,
) -> None:
    """As `crd_fast.models.quantize.quantize`, with 4-bit weights in ordinary parameters: bitsandbytes' own
    class of parameters cannot hold a fake tensor."""
    from crd_fast.models import quantize

    if kind != "nf4":
        quantize.quantize(network, kind, dtype, device, keep)
        return
    import bitsandbytes as bnb

    of_shape: dict[torch.Size, tuple[torch.Tensor, Any]] = {}  # bitsandbytes' Python takes long on fakes
    for name in quantize.quantized_layers(network, keep):
        path, _, child = name.rpartition(".")
        parent = network.get_submodule(path)
        layer = getattr(parent, child)
        new = quantize.empty_nf4(layer, dtype)
        shape = layer.weight.shape
        if shape not in of_shape:
            of_shape[shape] = bnb.functional.quantize_4bit(
                layer.weight.data, compress_statistics=True, quant_type="nf4"
            )
        codes, state = of_shape[shape]
        weight: Any = nn.Parameter(torch.empty_like(codes), requires_grad=False)
        weight.quant_state = _another(state)
        new.weight, new.bias = weight, layer.bias
        setattr(parent, child, new)


def _another(state: Any) -> Any:
    """A quant_state like this one, in tensors of its own."""
    new = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(new, name, torch.empty_like(value))
    if state.state2 is not None:
        new.state2 = _another(state.state2)
    return new
