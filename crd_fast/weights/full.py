"""The four sets of weights of one network: policy, old, sampler, reference.

`policy` is trained; `old` and `sampler` are snapshots blended towards it; `reference` is the pretrained
network. With LoRA they are three adapters on one base, and no adapter. With full fine-tuning they are
three more copies of the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders import SD3LoraLoaderMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from crd_fast.errors import UserError

SNAPSHOTS = ("old", "sampler")


class LoraWeights:
    """Low-rank adapters `policy`, `old` and `sampler` on a frozen base.

    loader: the pipeline's mixin of diffusers, which knows how its LoRA files are written; device: of the
    adapters, by default that of the layers.
    Raises UserError if a target matches no linear layer.
    """

    def __init__(
        self,
        network: torch.nn.Module,
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
            r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True
        )
        check_targets(network, targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # three adapters are meant
                for name in ("policy", *SNAPSHOTS):
                    network.add_adapter(self.config, adapter_name=name)
        self._layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:  # for good: compiled code does not notice a hook that comes later
            layer.adapters_of_rows = None
            layer.register_forward_pre_hook(_choose_rows, with_kwargs=True)
        self._parameters = {name: self._adapter(name) for name in ("policy", *SNAPSHOTS)}
        for parameters in self._parameters.values():
            for key, parameter in parameters.items():
                parameter.data = parameter.data.to(device, torch.float32)
                parameter.data.copy_(self._parameters["policy"][key])
                # only the policy is ever given to an optimizer, but torch.matmul chooses its algorithm by
                # this flag: equal weights must give equal velocities to the bit
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
        self._activate(name)
        try:
            yield
        finally:
            self._activate("policy")

    @contextmanager
    def use_rows(self, names: list[str]) -> Iterator[None]:
        """Within this context each row of a batch has the weights of its name. Without gradient."""
        adapters = ["__base__" if name == "reference" else name for name in names]  # as peft calls it
        for layer in self._layers:
            layer.adapters_of_rows = adapters
        try:
            yield
        finally:
            for layer in self._layers:
                layer.adapters_of_rows = None

    def _activate(self, name: str) -> None:
        for layer in self._layers:
            layer._disable_adapters = name == "reference"
            if name != "reference":
                layer._active_adapter = [name]

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * policy."""
        _blend(self._parameters[name].values(), self.trained(), decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that changes during training, by `set/parameter`."""
        return _joined(self._parameters)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        _load(self._parameters, state)

    def save_policy(self, folder: Path) -> None:
        """The trained adapter twice: `diffusers/` for `load_lora_weights`, `peft/` for `PeftModel`.

        In folders of their own: diffusers takes the one safetensors file that it finds.
        """
        state = get_peft_model_state_dict(self.network, adapter_name="policy")
        state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        self.config.save_pretrained(folder / "peft")
        prefixed = {f"base_model.model.{key}": value for key, value in state.items()}
        save_file(prefixed, folder / "peft" / "adapter_model.safetensors")
        self.loader.save_lora_weights(
            folder / "diffusers",
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata=self.config.to_dict(),
        )


def _choose_rows(layer: BaseTunerLayer, args: tuple, kwargs: dict) -> tuple | None:
    """Before a layer's forward: which adapter each row has, where they differ."""
    if layer.adapters_of_rows is None:
        return None
    return args, kwargs | {"adapter_names": layer.adapters_of_rows}


class FullWeights:
    """All weights of the network are trained; snapshots and reference are copies to be swapped in.

    policy: what is trained, by name, where it is not the network's parameters themselves.
    """

    def __init__(self, network: torch.nn.Module, policy: dict[str, torch.nn.Parameter] | None = None):
        self.network = network
        network.requires_grad_(True)
        self._sets = {"policy": policy or dict(network.named_parameters())}
        self._add_copies(self._sets["policy"])

    def _add_copies(self, policy: dict[str, torch.nn.Parameter]) -> None:
        for name in (*SNAPSHOTS, "reference"):
            self._sets[name] = {key: parameter.detach().clone() for key, parameter in policy.items()}

    def trained(self) -> list[torch.nn.Parameter]:
        return list(self._sets["policy"].values())

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Within this context the network has the weights of `name`, afterwards those of the policy."""
        if name == "policy":
            yield
            return
        self._put(name)
        try:
            yield
        finally:
            self._put_back(name)

    def _put(self, name: str) -> None:
        self._exchange(name)

    def _put_back(self, name: str) -> None:
        self._exchange(name)

    def _exchange(self, name: str) -> None:
        """Policy and set change places; nothing is copied."""
        for parameter, value in zip(self.trained(), self._sets[name].values()):
            parameter.data, value.data = value.data, parameter.data

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * policy."""
        _blend(self._sets[name].values(), self.trained(), decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that changes during training, by `set/parameter`."""
        return _joined({name: self._sets[name] for name in ("policy", *SNAPSHOTS)})

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        _load({name: self._sets[name] for name in ("policy", *SNAPSHOTS)}, state)

    def save_policy(self, folder: Path) -> None:
        """The trained network, as diffusers saves and loads it."""
        self.network.save_pretrained(folder / "transformer")


class HostWeights(FullWeights):
    """As FullWeights, with one set of weights on the device and copies of all on the host, pinned for a GPU.

    To use a set is to copy it over the policy, and the policy back. Snapshots are float32 whatever the
    network is: a blend with decay 0.999 would be lost in bfloat16, and a float32 copy of bfloat16 rounds back
    exactly.
    """

    def _add_copies(self, policy: dict[str, torch.nn.Parameter]) -> None:
        for name in SNAPSHOTS:
            self._sets[name] = {key: _on_host(value, torch.float32) for key, value in policy.items()}
        for name in ("reference", "policy on the host"):
            self._sets[name] = {key: _on_host(value, value.dtype) for key, value in policy.items()}

    def host_tensors(self) -> list[torch.Tensor]:
        return [value for name, s in self._sets.items() if name != "policy" for value in s.values()]

    def _put(self, name: str) -> None:
        self._fetch_policy()
        self._copy_from(name)

    def _put_back(self, name: str) -> None:
        self._copy_from("policy on the host")

    @torch.no_grad()
    def _fetch_policy(self) -> list[torch.Tensor]:
        host = list(self._sets["policy on the host"].values())
        for value, parameter in zip(host, self.trained()):
            value.copy_(parameter)
        return host

    @torch.no_grad()
    def _copy_from(self, name: str) -> None:
        for parameter, value in zip(self.trained(), self._sets[name].values()):
            parameter.copy_(value, non_blocking=True)

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """snapshot <- decay * snapshot + (1 - decay) * policy."""
        for value, policy in zip(self._sets[name].values(), self._fetch_policy()):
            _blend([value], [policy.float()], decay)


def _on_host(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    copy = value.detach().to("cpu", dtype, copy=True)
    return copy.pin_memory() if value.is_cuda else copy


def check_targets(network: torch.nn.Module, targets: list[str]) -> None:
    """Raises UserError for the first target that matches no linear layer, by the end of its name."""
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise UserError(f"model.lora_targets: {target!r} matches no layer of {type(network).__name__}")


def _blend(snapshot, policy, decay: float) -> None:
    if decay == 0.0:  # an exact copy, also where lerp would round
        torch._foreach_copy_(list(snapshot), list(policy))
    else:
        torch._foreach_lerp_(list(snapshot), list(policy), 1.0 - decay)


def _joined(sets: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value.detach() for name, values in sets.items() for key, value in values.items()}


@torch.no_grad()
def _load(sets: dict[str, dict[str, torch.Tensor]], state: dict[str, torch.Tensor]) -> None:
    own = _joined(sets)
    if own.keys() != state.keys():
        missing = sorted(own.keys() ^ state.keys())[0]
        raise UserError(
            f"checkpoint: made with another model or other LoRA targets ({missing} does not match)"
        )
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise UserError(
                f"checkpoint: {key}: expected shape {tuple(value.shape)}, got {tuple(state[key].shape)}"
            )
    for key, value in own.items():
        value.copy_(state[key])
