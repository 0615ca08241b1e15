"""Reading a LoRA file of diffusers, kohya, ai-toolkit or peft, through diffusers and peft themselves."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils import logging as logs
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from crd_fast.errors import UserError
from crd_fast.weights.lora_file import lora_file

READ = "read"  # name of the adapter that a file is read into
# in names of tensors: what is no product of A and B, or more than that
OTHERS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
}
PART = re.compile(r"\.(lora|alpha).*$")  # of an adapter's tensor, behind the layer's name
# layers of FLUX.1 whose alpha diffusers leaves out where it reads kohya's names, and these names
WITHOUT_ALPHA = {
    "proj_out": "lora_unet_final_layer_linear",
    "norm_out.linear": "lora_unet_final_layer_adaLN_modulation_1",
}

OF_PEFT = "base_model.model."  # before the names of tensors that `PeftModel.save_pretrained` writes

Adapters = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # A, B and scaling by layer

logger = logging.getLogger("crd_fast")


def read_lora(network: Any, file: Path, loader: Any) -> Adapters:
    """A, B and scaling of each layer that a file adapts, by the layer's name, as diffusers reads it.

    A and B are the file's own: in the network they are rounded to its dtype. Beyond what diffusers does, an
    alpha beside tensors of its own names counts, layers count that are named without `transformer.`, and
    peft's own files are read, with the adapter_config.json beside them. The adapters that the network has are
    frozen afterwards. Raises UserError, one line, for what is no LoRA of this transformer.
    """
    file = lora_file(file)
    names = _names_in(file)
    of_peft = bool(names) and all(name.startswith(OF_PEFT) for name in names)
    if of_peft and not file.with_name("adapter_config.json").is_file():
        raise UserError(
            f"LoRA {file}: expected peft's adapter_config.json beside it, which says how strong it is"
        )
    state, scaling = _loaded_once(network, file, loader, of_peft)
    if not scaling:
        first = f", but {names[0]}" if names else ""
        raise UserError(f"LoRA {file}: found no adapter of this transformer in it{first}")
    adapters = {}
    for name in scaling:
        down, up = (state.get(f"transformer.{name}.lora_{part}.weight") for part in "AB")
        if down is None or up is None:
            lacks = "A" if down is None else "B"
            raise UserError(f"LoRA {file}: expected A and B of each layer, got no {lacks} of {name}")
        if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
            raise UserError(f"LoRA {file}: expected finite numbers, got NaN or infinity in {name}")
        alpha = state.get(f"transformer.{name}.alpha")
        adapters[name] = down, up, scaling[name] if alpha is None else float(alpha) / len(down)
    known = {f"transformer.{name}" for name in adapters}
    if left := list(dict.fromkeys(PART.sub("", name) for name in state if PART.sub("", name) not in known)):
        logger.warning(
            "warning: LoRA %s: what it adapts beside layers of the transformer is left out: %s%s",
            file,
            left[0],
            f" and {len(left) - 1} more" * (len(left) > 1),
        )
    return adapters


def _loaded_once(
    network: Any, file: Path, loader: Any, of_peft: bool
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The file's tensors, and the scaling of each layer that they adapt: loaded as an adapter, then deleted.

    Raises UserError where that fails, and for a layer that is not linear or has a bias beside A and B.
    """
    verbosity = logs.get_verbosity()
    logs.set_verbosity(logging.CRITICAL)  # what it says of a file, our errors say in one line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = _by_peft(file) if of_peft else _by_diffusers(file, loader)
            state = _load_adapter(network, file, *read)
            layers = {name: layer for name, layer in adapted_layers(network).items() if READ in layer.scaling}
            biased = next((name for name, layer in layers.items() if layer.lora_bias[READ]), None)
            scaling = {name: layer.scaling[READ] for name, layer in layers.items()}
            other = [
                n for n, layer in layers.items() if not isinstance(layer.get_base_layer(), torch.nn.Linear)
            ]
        except Exception as error:  # whatever diffusers and peft raise for a file that is none
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"LoRA {file}: expected a LoRA of this transformer: {reason}") from error
        finally:
            logs.set_verbosity(verbosity)
            if READ in getattr(network, "peft_config", {}):
                network.delete_adapters(READ)
    if biased is not None:
        raise UserError(f"LoRA {file}: expected adapters without a bias, got one of {biased}")
    if other:
        raise UserError(f"LoRA {file}: expected adapters of linear layers, got one of {other[0]}")
    return state, scaling


def adapted_layers(network: torch.nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _names_in(file: Path) -> list[str]:
    """The names of a file's tensors; none if it cannot be read, for what reads it next says why.

    Raises UserError for a file that has other than A and B, which some of diffusers' readers pass over.
    """
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except (OSError, SafetensorError):
        return []
    if found := next(((kind, name) for name in names for part, kind in OTHERS.items() if part in name), None):
        raise UserError(f"LoRA {file}: expected a LoRA, got a {found[0]} ({found[1]})")
    return names


def _by_peft(file: Path) -> tuple[dict[str, torch.Tensor], dict, None]:
    """As `_by_diffusers`, of a file that peft wrote, with its config beside it."""
    state = {name.removeprefix(OF_PEFT): value for name, value in load_file(file).items()}
    config = LoraConfig.from_pretrained(str(file.parent)).to_dict()
    return state, {f"transformer.{name}": value for name, value in config.items()}, None


def _by_diffusers(file: Path, loader: Any) -> tuple[dict[str, torch.Tensor], dict | None, dict | None]:
    """What `loader` reads of a file: tensors, and the config and alphas where it has them."""
    if "return_alphas" in inspect.signature(loader.lora_state_dict).parameters:
        state, alphas, metadata = loader.lora_state_dict(
            str(file), return_alphas=True, return_lora_metadata=True
        )
        return state, metadata, alphas
    return *loader.lora_state_dict(str(file), return_lora_metadata=True), None


def _load_adapter(
    network: Any, file: Path, state: dict[str, torch.Tensor], metadata: dict | None, alphas: dict | None
) -> dict[str, torch.Tensor]:
    """Loads what was read as the adapter `READ`. Returns the tensors by diffusers' names for layers."""
    if not any(".lora_A." in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    modules = dict(network.named_modules())
    state = {
        f"transformer.{name}" if PART.sub("", name) in modules else name: value
        for name, value in state.items()
    }
    tensors = dict(state) | _alphas_left_out(file)  # a copy: `load_lora_adapter` takes out what it loads
    if any(".lora_A." in name for name in state):
        network.load_lora_adapter(
            state,
            network_alphas=alphas or None,
            metadata=None if alphas else metadata,
            adapter_name=READ,
        )
    return tensors


def _alphas_left_out(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        return {
            f"transformer.{layer}.alpha": opened.get_tensor(f"{name}.alpha")
            for layer, name in WITHOUT_ALPHA.items()
            if f"{name}.alpha" in names
        }
