"""Trained weights in the form that other programs take: diffusers, ComfyUI, a pipeline with them inside.

Nothing of a run is executed here: no reward is imported, and of its checkpoint safetensors and JSON are read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.file_modes import copy_files
from crd_fast.models import FAMILIES, checks, family, find_pipeline
from crd_fast.models.components import with_weights
from crd_fast.once import hush
from crd_fast.train.places import check_base, recipe_of
from crd_fast.weights import checkpoint
from crd_fast.worlds import WORLDS

METADATA = "lora_adapter_metadata"  # where diffusers keeps a LoRA's rank and alpha in its file

_BLOCK = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|norm1(_context)?\.linear"
_FF = r"ff(_context)?\.net\.(0\.proj|2)"
_TIMES = r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
_ENDS = r"context_embedder|norm_out\.linear|proj_out"
# By pipeline: the layers whose adapters ComfyUI takes by diffusers' names, `transformer.` before them; as its
# comfy/lora.py and comfy/utils.py map them. Of Qwen-Image it has all names as diffusers has them.
COMFYUI = {
    "StableDiffusion3Pipeline": (
        rf"transformer_blocks\.\d+\.({_BLOCK}|attn2\.(to_[qkv]|to_out\.0)|{_FF})|{_TIMES}|{_ENDS}"
    ),
    "FluxPipeline": (
        rf"transformer_blocks\.\d+\.({_BLOCK}|{_FF})|{_TIMES}|{_ENDS}|x_embedder|"
        r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    ),
    "Flux2KleinPipeline": (
        rf"transformer_blocks\.\d+\.({_BLOCK}|ff(_context)?\.linear_(in|out))|{_ENDS}|x_embedder|"
        r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
    "QwenImagePipeline": r".+",
    "ZImagePipeline": (
        r"(layers|context_refiner|noise_refiner)\.\d+\."
        r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)|"
        r"all_final_layer\.2-1\.(linear|adaLN_modulation\.1)|all_x_embedder\.2-1|cap_embedder\.1|"
        r"t_embedder\.mlp\.[02]"
    ),
}


@dataclass(frozen=True)
class Trained:
    """A checkpoint, of which nothing is loaded yet.

    folder: its own; run: of the run that made it, None where it has left that. state: its JSON. written:
    where other weights of it than it holds for diffusers have been written.
    """

    folder: Path
    run: Path | None
    recipe: Recipe
    state: dict[str, Any]
    written: Path | None = None

    @classmethod
    def of(cls, source: str, which: str | None = None, base: str | None = None) -> Trained:
        """From the folder of a run or of a checkpoint.

        which: as of `checkpoint.find`. base: where the model is that the run began with, if it has moved.
        """
        if source in WORLDS:
            raise UserError(f"{source}: nothing is trained in it, expected a run or a checkpoint")
        if not Path(source).is_dir():
            raise UserError(f"{source}: no such folder (expected a run or a checkpoint)")
        folder = checkpoint.find(Path(source), which).resolve()
        state = checkpoint.read_state(folder)
        recipe = recipe_of(state, folder, base)
        run = folder.parent.parent
        return cls(folder, run if (run / "config.yaml").is_file() else None, recipe, state)

    @property
    def iteration(self) -> int:
        return self.state["iteration"]

    @property
    def full(self) -> bool:
        """Whether all weights are trained, and not a LoRA."""
        return self.recipe.model.method == "full"

    @property
    def weights(self) -> Path:
        """What diffusers loads: the folder of the LoRA or of the transformer."""
        return (self.written or self.folder) / ("transformer" if self.full else "diffusers")

    def pipeline(self, for_what: str) -> str:
        """The name of its pipeline's class. Raises UserError for a model that ships, which has none."""
        if self.recipe.model.path in WORLDS:
            raise UserError(
                f"--to {for_what}: {self.recipe.model.path} is a small model of this package and no pipeline "
                "that other programs load; expected --to diffusers"
            )
        name = self.state["model"]["name"]
        kinds: dict[str, Any] = {pipeline: family(pipeline) for pipeline in FAMILIES}
        found = [pipeline for pipeline, kind in kinds.items() if kind.name == name]
        if not found:
            raise UserError(f"{self.folder}: a model of an unknown family, {name}")
        return found[0]


def with_set(trained: Trained, name: str, folder: Path) -> Trained:
    """The same with the set of weights `name` where diffusers looks, written below `folder`.

    Raises UserError where the checkpoint has no such set.
    """
    if name == trained.recipe.evaluate.weights:
        return trained
    known = ("policy", *trained.recipe.snapshots.names)
    if name not in known:
        raise UserError(f"--weights {name}: {trained.folder} has none, expected one of {', '.join(known)}")
    out = folder / trained.weights.name
    copy_files(trained.weights, out)
    strength = 1.0
    if not trained.full:
        lora = trained.recipe.model
        strength = lora.lora_alpha / lora.lora_rank / read_lora(out)[1]
    with safe_open(trained.folder / checkpoint.TENSORS, "pt") as stored:
        there = set(stored.keys())
        for file in sorted(out.glob("*.safetensors")):
            tensors = {}
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
                for key in opened.keys():  # noqa: SIM118  no mapping
                    value = opened.get_tensor(key)
                    source = f"weights/{name}/" + (key if trained.full else key.removeprefix("transformer."))
                    if source in there:
                        factor = strength if ".lora_B." in key else 1.0
                        value = (stored.get_tensor(source) * factor).to(value.dtype)
                    tensors[key] = value.clone()  # nothing of the file that is written over
            file.unlink()
            save_file(tensors, file, metadata=metadata)
    return replace(trained, written=folder)


def copy_weights(trained: Trained, out: Path) -> None:
    """The LoRA's folder, for `load_lora_weights`, or the transformer's, for `from_pretrained`."""
    copy_files(trained.weights, out)


def write_comfyui(trained: Trained, out: Path) -> None:
    """One file with the names that ComfyUI reads, alpha in the tensors.

    Raises UserError for a family, or an adapted layer, that it does not read, and where there is no LoRA.
    """
    pipeline = trained.pipeline("comfyui")
    if trained.full:
        raise UserError("--to comfyui: expected a run with model.method lora, got full")
    if pipeline not in COMFYUI:
        raise UserError(f"--to comfyui: ComfyUI does not read {FAMILIES[pipeline][2]}")
    tensors, strength = read_lora(trained.weights)
    for key in tensors:
        layer = re.sub(r"\.lora_[AB]\.weight$", "", key.removeprefix("transformer."))
        if not re.fullmatch(COMFYUI[pipeline], layer):
            raise UserError(f"--to comfyui: ComfyUI reads no adapter of {layer} (model.lora_targets)")
    scaled = {key: value * (strength if ".lora_B." in key else 1) for key, value in tensors.items()}
    save_file(scaled, out, metadata={"format": "pt"})


def read_lora(folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors of the one file in it, and by what their product is to be multiplied: alpha / rank.

    1 in what is written today; earlier versions left alpha to what the file says beside its tensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    try:
        with safe_open(files[0], "pt") as opened:
            said = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  no mapping
    except (IndexError, OSError, ValueError, SafetensorError):
        raise UserError(f"{folder}: expected the file of a LoRA, found none that can be read") from None
    rank = said.get("transformer.r")
    return tensors, said.get("transformer.lora_alpha", rank) / rank if rank else 1.0


def write_fused(trained: Trained, out: Path) -> None:
    """The whole pipeline with the policy's weights as its transformer's, for `from_pretrained`.

    Each component keeps the dtype that it has on the disk; where all weights were trained, the transformer
    has that in which it was. Raises UserError where the base is missing, damaged or another model.
    """
    trained.pipeline("fused")
    check_base(trained.recipe, trained.folder)
    folder, found = find_pipeline(trained.recipe.model.path)
    checks.check_files(folder)
    pipe = _load(folder, found.pipeline, trained.weights if trained.full else None)  # type: ignore[attr-defined]
    seen = SimpleNamespace(name=found.name, transformer=pipe.transformer, folder=folder)  # type: ignore[attr-defined]
    checkpoint.check_same_model(trained.state, seen, trained.folder)
    if not trained.full:
        _fuse(pipe, trained.weights)
    pipe.save_pretrained(out)


def _fuse(pipe: Any, lora: Path) -> None:
    """Puts a LoRA into a pipeline's weights, of which no adapter stays."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of a LoRA that has nothing for text encoders
    try:
        pipe.load_lora_weights(str(lora))
    finally:
        logging.set_verbosity(verbosity)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _load(folder: Path, pipeline: Any, transformer: Path | None) -> Any:
    """A pipeline on the host as it lies on the disk. transformer: the folder of one in its own's place."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    hush("diffusers", "transformers")
    transformers.utils.logging.set_verbosity_error()  # it warns of image processors that nobody asked for
    parts = {name: part for name, part in checks.read_index(folder).items() if isinstance(part, list)}
    libraries = {"diffusers": diffusers, "transformers": transformers}
    given: dict[str, Any] = {name: None for name, part in parts.items() if not part[0]}
    for name, (library, kind) in parts.items():
        network = getattr(libraries.get(library), kind or "", None)
        if isinstance(network, type) and issubclass(network, torch.nn.Module):
            source = transformer if name == "transformer" and transformer else folder / name
            given[name] = with_weights(network, source, checks.stored_dtype(source))
    return pipeline.from_pretrained(folder, **given)
