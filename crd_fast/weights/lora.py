"""Policy and snapshots as three adapters on one base; the reference is the base without one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders import SD3LoraLoaderMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from crd_fast.models.targets import check_targets
from crd_fast.weights.base import Weights
from crd_fast.weights.sets import SNAPSHOTS, blend, equal, joined, load

if TYPE_CHECKING:
    from diffusers import ModelMixin


class LoraWeights(Weights):
    """Low-rank adapters `policy`, `old` and `sampler` on a frozen base.

    loader: the pipeline's mixin of diffusers, which knows how its LoRA files are written; device: of the
    adapters, by default that of the layers.
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
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # three adapters are meant
                for name in ("policy", *SNAPSHOTS):
                    network.add_adapter(self.config, adapter_name=name)
        self._layers: list[Any] = [
            module for module in network.modules() if isinstance(module, BaseTunerLayer)
        ]
        for layer in self._layers:  # for good: compiled code does not notice a hook that comes later
            layer.adapters_of_rows = None
            layer.register_forward_pre_hook(_choose_rows, with_kwargs=True)
        self._parameters = {name: self._adapter(name) for name in ("policy", *SNAPSHOTS)}
        for parameters in self._parameters.values():
            for key, parameter in parameters.items():
                parameter.data = parameter.data.to(device, torch.float32)
                parameter.data.copy_(self._parameters["policy"][key])
                # only the policy is ever given to an optimizer, but torch.matmul chooses its algorithm by
                # this flag, and snapshots should round as the policy does
                parameter.requires_grad_(True)
        self._activate("policy")

    def _adapter(self, name: str) -> dict[str, torch.nn.Parameter]:
        marker = f".{name}."
        return {
            key.replace(marker, "."): parameter
            for key, parameter in self.network.named_parameters()
            if marker in key and "lora_" in key
        }

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

    def save_policy(self, folder: Path) -> None:
        """The trained adapter twice: `diffusers/` for `load_lora_weights`, `peft/` for `PeftModel`.

        alpha / rank is multiplied into B, and beside the tensors alpha is said to be the rank: loaders that
        read the tensors alone take it for that. In folders of their own: diffusers takes the one safetensors
        file that it finds.
        """
        strength = self.config.lora_alpha / self.config.r
        state = {
            key: value.detach().cpu() * (strength if "lora_B" in key else 1)
            for key, value in get_peft_model_state_dict(self.network, adapter_name="policy").items()
        }
        config = dataclasses.replace(self.config, lora_alpha=self.config.r)
        config.save_pretrained(str(folder / "peft"))
        prefixed = {f"base_model.model.{key}": value for key, value in state.items()}
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
