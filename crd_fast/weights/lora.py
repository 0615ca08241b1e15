"""Policy and snapshots as three adapters on one base; the reference is the base without one."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils import logging as logs
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from crd_fast.errors import UserError
from crd_fast.models.targets import check_targets
from crd_fast.weights.base import Weights
from crd_fast.weights.lora_file import lora_file
from crd_fast.weights.sets import SNAPSHOTS, blend, equal, joined, load

if TYPE_CHECKING:
    from diffusers import ModelMixin

BESIDE = "read"  # name of the adapter that a file is read into
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


class LoraWeights(Weights):
    """Low-rank adapters `policy` and its snapshots on a frozen base.

    loader: the pipeline's mixin of diffusers, which knows how its LoRA files are written; device: of the
    adapters, by default that of the layers; snapshots: their names.
    Raises UserError if a target matches no linear layer.
    """

    def __init__(
        self,
        network: ModelMixin,
        rank: int,
        alpha: float,
        targets: list[str],
        seed: int,
        loader=SD3LoraLoaderMixin,
        device: torch.device | None = None,
        snapshots: Sequence[str] = SNAPSHOTS,
    ):
        self.network, self.loader = network, loader
        network.requires_grad_(False)
        self.config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # any number
            target_modules=list(targets),
            init_lora_weights=True,
        )
        check_targets(network, targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # they are meant
                for name in ("policy", *snapshots):
                    network.add_adapter(self.config, adapter_name=name)
        self._layers: list[Any] = list(_layers_of(network).values())
        for layer in self._layers:  # for good: compiled code does not notice a hook that comes later
            layer.adapters_of_rows = None
            layer.register_forward_pre_hook(_choose_rows, with_kwargs=True)
        self._parameters = {name: self._adapter(name) for name in ("policy", *snapshots)}
        for parameters in self._parameters.values():
            for parameter in parameters.values():
                parameter.data = parameter.data.to(device, torch.float32)
                # only the policy is ever given to an optimizer, but torch.matmul chooses its algorithm by
                # this flag, and snapshots should round as the policy does
                parameter.requires_grad_(True)
        for name in snapshots:
            self.blend(name, 0.0)
        self._activate("policy")

    @classmethod
    def of_file(
        cls,
        network: ModelMixin,
        file: Path,
        loader=SD3LoraLoaderMixin,
        device: torch.device | None = None,
    ) -> LoraWeights:
        """With the layers and the highest rank of a LoRA file, and begun with it.

        Raises UserError, one line, for what is no LoRA of this transformer.
        """
        found = _adapters_of(network, file, loader)
        network.unload_lora()  # the layers are as they were, for adapters with our names
        rank = max(down.shape[0] for down, _, _ in found.values())
        weights = cls(network, rank, rank, list(found), 0, loader, device)
        weights._begin_with(found)
        return weights

    def _adapter(self, name: str) -> dict[str, torch.nn.Parameter]:
        marker = f".{name}."
        return {
            key.replace(marker, "."): parameter
            for key, parameter in self.network.named_parameters()
            if marker in key and "lora_" in key
        }

    def start_from(self, file: Path) -> None:
        """Policy and snapshots become the LoRA in a file, at the strength that diffusers gives it.

        diffusers reads it: its own, kohya's and ai-toolkit's names, with alpha in tensors or metadata. A file
        of lower rank leaves the rest of the rank as it was made, with no effect. Raises UserError, one line,
        for what is no LoRA of this transformer, has a higher rank, or adapts layers that are not trained.
        """
        self._begin_with(self._read(file))

    @torch.no_grad()
    def _begin_with(self, found: Adapters) -> None:
        for key, (down, up, scaling) in found.items():
            for parameters in self._parameters.values():
                a, b = parameters[f"{key}.lora_A.weight"], parameters[f"{key}.lora_B.weight"]
                rank = down.shape[0]
                a[:rank] = down.to(a)
                b[:, :rank] = up.to(b) * (scaling * self.config.r / self.config.lora_alpha)

    def _read(self, file: Path) -> Adapters:
        """A, B and scaling of each layer that a file adapts, of the layers here."""
        try:
            found = _adapters_of(self.network, file, self.loader)
        finally:
            for parameters in self._parameters.values():  # the adapter that came last had frozen them
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
            self._activate("policy")
        foreign = [name for name in found if f"{name}.lora_A.weight" not in self._parameters["policy"]]
        if foreign:
            raise UserError(
                f"LoRA {file} adapts {foreign[0]} and {len(foreign) - 1} more layers that are "
                "not trained; name them in model.lora_targets"
            )
        highest = max(down.shape[0] for down, _, _ in found.values())
        if highest > self.config.r:
            raise UserError(
                f"model.lora_rank: expected at least {highest}, as {file} has, got {self.config.r}"
            )
        return found

    def trained(self) -> list[torch.nn.Parameter]:
        return list(self._parameters["policy"].values())

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Within this context the network has the weights of `name`, afterwards those of the policy."""
        try:
            self._activate(name)
            yield
        finally:
            self._activate("policy")

    @contextmanager
    def use_rows(self, names: list[str]) -> Iterator[None]:
        """Within this context each row of a batch has the weights of its name. Without gradient."""
        adapters = ["__base__" if name == "reference" else name for name in names]  # as peft calls it
        try:
            for layer in self._layers:
                layer.adapters_of_rows = adapters
            yield
        finally:
            for layer in self._layers:
                layer.adapters_of_rows = None

    def is_policy(self, name: str) -> bool:
        """Whether a snapshot is equal to the policy, in every tensor."""
        return equal(self._parameters[name].values(), self.trained())

    def _activate(self, name: str) -> None:
        for layer in self._layers:
            layer._disable_adapters = name == "reference"
            if name != "reference":
                layer._active_adapter = [name]

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * policy."""
        blend(self._parameters[name].values(), self.trained(), decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that changes during training, by `set/parameter`."""
        return joined(self._parameters)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        load(self._parameters, state)

    def save_policy(self, folder: Path, name: str = "policy") -> None:
        """The trained adapter, or a snapshot of it, twice.

        `diffusers/` is for `load_lora_weights`, `peft/` for `PeftModel`.
        alpha / rank is multiplied into B, and beside the tensors alpha is said to be the rank: loaders that
        read the tensors alone take it for that. In folders of their own: diffusers takes the one safetensors
        file that it finds.
        """
        strength = self.config.lora_alpha / self.config.r
        state = {
            key: value.detach().cpu() * (strength if "lora_B" in key else 1)
            for key, value in get_peft_model_state_dict(self.network, adapter_name=name).items()
        }
        config = dataclasses.replace(self.config, lora_alpha=self.config.r)
        config.save_pretrained(str(folder / "peft"))
        prefixed = {f"{OF_PEFT}{key}": value for key, value in state.items()}
        save_file(prefixed, folder / "peft" / "adapter_model.safetensors")
        self.loader.save_lora_weights(
            folder / "diffusers",
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata=config.to_dict(),
        )


def _choose_rows(layer: Any, args: tuple, kwargs: dict) -> tuple | None:
    """Before a layer's forward: which adapter each row has, where they differ."""
    if layer.adapters_of_rows is None:
        return None
    return args, kwargs | {"adapter_names": layer.adapters_of_rows}


def _adapters_of(network: Any, file: Path, loader: Any) -> Adapters:
    """A, B and scaling of each layer that a file adapts, by the layer's name, as diffusers reads it.

    A and B are the file's own: in the network they are rounded to its dtype. Beyond what diffusers does, an
    alpha beside tensors of its own names counts, layers count that are named without `transformer.`, and
    peft's own files are read, with the adapter_config.json beside them.
    """
    file = lora_file(file)
    names = _names_in(file)
    of_peft = bool(names) and all(name.startswith(OF_PEFT) for name in names)
    if of_peft and not file.with_name("adapter_config.json").is_file():
        raise UserError(
            f"LoRA {file}: expected peft's adapter_config.json beside it, which says how strong it is"
        )
    said = logs.get_verbosity()
    logs.set_verbosity(logging.CRITICAL)  # what it says of a file, our errors say in one line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = _load_beside(network, file, *(_by_peft(file) if of_peft else _by_diffusers(file, loader)))
            layers = {name: layer for name, layer in _layers_of(network).items() if BESIDE in layer.scaling}
            biased = next((name for name, layer in layers.items() if layer.lora_bias[BESIDE]), None)
            scaling = {name: layer.scaling[BESIDE] for name, layer in layers.items()}
            linear = {n for n, layer in layers.items() if isinstance(layer.get_base_layer(), torch.nn.Linear)}
        except Exception as error:  # whatever diffusers and peft raise for a file that is none
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"LoRA {file}: expected a LoRA of this transformer: {reason}") from error
        finally:
            logs.set_verbosity(said)
            if BESIDE in getattr(network, "peft_config", {}):
                network.delete_adapters(BESIDE)
    if not layers:
        first = f", but {names[0]}" if names else ""
        raise UserError(f"LoRA {file}: found no adapter of this transformer in it{first}")
    if biased is not None:
        raise UserError(f"LoRA {file}: expected adapters without a bias, got one of {biased}")
    if others := [name for name in layers if name not in linear]:
        raise UserError(f"LoRA {file}: expected adapters of linear layers, got one of {others[0]}")
    found = {}
    for name in layers:
        down, up = (state.get(f"transformer.{name}.lora_{part}.weight") for part in "AB")
        if down is None or up is None:
            lacks = "A" if down is None else "B"
            raise UserError(f"LoRA {file}: expected A and B of each layer, got no {lacks} of {name}")
        if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
            raise UserError(f"LoRA {file}: expected finite numbers, got NaN or infinity in {name}")
        alpha = state.get(f"transformer.{name}.alpha")
        found[name] = down, up, scaling[name] if alpha is None else float(alpha) / len(down)
    known = {f"transformer.{name}" for name in found}
    if left := list(dict.fromkeys(PART.sub("", name) for name in state if PART.sub("", name) not in known)):
        logger.warning(
            "warning: LoRA %s: what it adapts beside layers of the transformer is left out: %s%s",
            file,
            left[0],
            f" and {len(left) - 1} more" * (len(left) > 1),
        )
    return found


def _names_in(file: Path) -> list[str]:
    """Of a file's tensors; none where it cannot be read, which is said by what reads it.

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


def _load_beside(
    network: Any, file: Path, state: dict[str, torch.Tensor], metadata: dict | None, alphas: dict | None
) -> dict[str, torch.Tensor]:
    """Loads what was read as the adapter `BESIDE`. Returns the tensors by diffusers' names for layers."""
    if not any(".lora_A." in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    modules = dict(network.named_modules())
    state = {
        f"transformer.{name}" if PART.sub("", name) in modules else name: value
        for name, value in state.items()
    }
    found = dict(state) | _alphas_left_out(file)  # what is loaded is taken from the other
    if any(".lora_A." in name for name in state):
        network.load_lora_adapter(
            state, network_alphas=alphas or None, metadata=None if alphas else metadata, adapter_name=BESIDE
        )
    return found


def _alphas_left_out(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        return {
            f"transformer.{layer}.alpha": opened.get_tensor(f"{name}.alpha")
            for layer, name in WITHOUT_ALPHA.items()
            if f"{name}.alpha" in names
        }


def _layers_of(network: torch.nn.Module) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
