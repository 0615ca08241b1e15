"""Policy and snapshots as three adapters on one base; the reference is the base without one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders import SD3LoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from crd_fast.errors import UserError
from crd_fast.models.targets import check_targets
from crd_fast.weights.base import Weights
from crd_fast.weights.lora_reading import OF_PEFT, Adapters, adapted_layers, read_lora
from crd_fast.weights.sets import SNAPSHOTS, blend, equal, joined, load

if TYPE_CHECKING:
    from diffusers import ModelMixin


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
        self._layers: list[Any] = list(adapted_layers(network).values())
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
        adapters = read_lora(network, file, loader)
        network.unload_lora()  # the layers are as they were, for adapters with our names
        rank = max(down.shape[0] for down, _, _ in adapters.values())
        weights = cls(network, rank, rank, list(adapters), 0, loader, device)
        weights._begin_with(adapters)
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
    def _begin_with(self, adapters: Adapters) -> None:
        for key, (down, up, scaling) in adapters.items():
            for parameters in self._parameters.values():
                a, b = parameters[f"{key}.lora_A.weight"], parameters[f"{key}.lora_B.weight"]
                rank = down.shape[0]
                a[:rank] = down.to(a)
                b[:, :rank] = up.to(b) * (scaling * self.config.r / self.config.lora_alpha)

    def _read(self, file: Path) -> Adapters:
        """A, B and scaling of each layer that a file adapts, of the layers here."""
        try:
            adapters = read_lora(self.network, file, self.loader)
        finally:
            for parameters in self._parameters.values():  # the adapter that came last had frozen them
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
            self._activate("policy")
        foreign = [name for name in adapters if f"{name}.lora_A.weight" not in self._parameters["policy"]]
        if foreign:
            raise UserError(
                f"LoRA {file} adapts {foreign[0]} and {len(foreign) - 1} more layers that are "
                "not trained; name them in model.lora_targets"
            )
        highest = max(down.shape[0] for down, _, _ in adapters.values())
        if highest > self.config.r:
            raise UserError(
                f"model.lora_rank: expected at least {highest}, as {file} has, got {self.config.r}"
            )
        return adapters

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
