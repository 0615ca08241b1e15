"""Is this folder a whole pipeline, and this GPU one for the recipe? Asked before anything is loaded."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.prompt_cache import fingerprint_of_files
from crd_fast.sizes import Resolution, height_width

if TYPE_CHECKING:
    from crd_fast.models.pipeline import PipelineModel

INDEX = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")  # of weights, by diffusers and by transformers
# All files of one row must be there: where none is, transformers makes an empty vocabulary without a word.
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
)


def check_gpu(recipe: Recipe) -> None:
    """Raises UserError where the recipe computes in bfloat16 on a GPU that has none."""
    if not torch.cuda.is_available() or (capability := torch.cuda.get_device_capability()) >= (8, 0):
        return
    for key, value in (("train.precision", recipe.train.precision), ("model.dtype", recipe.model.dtype)):
        if value == "bf16":
            version = ".".join(map(str, capability))
            raise UserError(
                f"{key}: bf16 needs a GPU of compute capability 8.0 (Ampere) or later, got "
                f"{torch.cuda.get_device_name()} with {version}; expected fp32 there"
            )


def read_index(folder: Path) -> dict:
    """model_index.json. Raises UserError if the folder has none."""
    if not (folder / INDEX).exists():
        raise UserError(f"model.path: {folder}: expected a diffusers pipeline, found no {INDEX}")
    return _read_object(folder / INDEX)


def check_files(folder: Path) -> None:
    """Raises UserError naming the first file that a component of the pipeline lacks or that is cut short.

    And for a component that has been quantised already: its weights are neither trained nor adapted here.
    """
    for name, part in read_index(folder).items():
        if not isinstance(part, list) or part[0] is None:
            continue
        if not (folder / name).is_dir():
            raise UserError(f"model.path: {folder}: {name} ({part[1]}) is missing")
        needed = {"scheduler": "scheduler_config.json"}.get(name, "config.json")
        if name.startswith("tokenizer"):
            _check_vocabulary(folder / name)
        if name.startswith(("tokenizer", "feature_extractor")):
            continue
        _must_exist(folder / name / needed)
        if name != "scheduler":
            _refuse_quantized(folder / name)
            _check_weights(folder / name)


def check_components(path: str, index: dict, family: type[PipelineModel]) -> None:
    """Raises UserError for the first component that the pipeline wants and its index lacks, or the other way
    round, or whose class the libraries here do not have."""
    import diffusers
    import transformers

    where = f"model.path: {path}: {INDEX}"
    parameters = inspect.signature(family.pipeline.__init__).parameters
    for name, part in index.items():
        if isinstance(part, list) and name not in parameters:
            raise UserError(f"{where}: expected no {name} for {family.name}, got {json.dumps(part)}")
    for name, parameter in parameters.items():
        part = index.get(name)
        if parameter.default is not inspect.Parameter.empty or name == "self":
            continue
        if not isinstance(part, list) or len(part) != 2 or not part[1]:
            if name in family.optional and name in index:
                continue
            raise UserError(f"{where}: expected a {name} for {family.name}, got {json.dumps(part)}")
        library = {"diffusers": diffusers, "transformers": transformers}.get(part[0])
        if library is None:
            raise UserError(
                f"{where}: {name}: expected a class of diffusers or transformers, got {json.dumps(part)}, "
                "whose code would have to come with it"
            )
        # transformers makes the older names of tokenizers only when they are asked for
        if part[1] not in _names(library) and not hasattr(library, part[1]):
            raise UserError(
                f"{where}: {name}: expected a class of {part[0]} {library.__version__}, got {part[1]!r}, "
                "which a later version may have"
            )


@functools.cache
def _names(library: ModuleType) -> frozenset[str]:
    """Once: of transformers it takes a third of a second."""
    return frozenset(dir(library))


def check_configs(folder: Path) -> None:
    """Raises UserError naming the first config that says the pipeline's shapes and is not there."""
    for name, file in (
        ("transformer", "config.json"),
        ("vae", "config.json"),
        ("scheduler", "scheduler_config.json"),
    ):
        _must_exist(folder / name / file)
        _read_object(folder / name / file)


def check_scheduler(folder: Path) -> None:
    """Raises UserError for a schedule that is not walked from noise to image by the flow alone."""
    config = _read_object(folder / "scheduler" / "scheduler_config.json")
    for key, wanted in (
        ("num_train_timesteps", 1000),
        ("invert_sigmas", False),
        ("stochastic_sampling", False),
    ):
        if (found := config.get(key, wanted)) != wanted:
            raise UserError(f"model.path: {folder / 'scheduler'}: {key}: expected {wanted}, got {found}")


def _refuse_quantized(folder: Path) -> None:
    config = _read_object(folder / "config.json")
    if found := config.get("quantization_config"):
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise UserError(
            f"model.path: {folder} is quantised already ({method}); expected the original weights, which "
            "model.quantization: int8 or nf4 quantises here"
        )


def _check_vocabulary(folder: Path) -> None:
    if not any(all((folder / file).is_file() for file in files) for files in VOCABULARIES):
        wanted = ", or ".join(" and ".join(files) for files in VOCABULARIES)
        raise UserError(f"model.path: {folder / 'tokenizer.json'} is missing (expected {wanted})")


def _check_weights(folder: Path) -> None:
    for file in weight_files(folder):
        _must_exist(file)
        _check_length(file)


def variant(folder: Path) -> str | None:
    """The `fp16` of a component whose weights are only there as model.fp16.safetensors, or as shards that
    model.safetensors.index.fp16.json names; else None."""
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").exists() or (folder / f"{stem}.safetensors.index.json").exists():
            return None
    for stem in STEMS:
        for pattern in (f"{stem}.safetensors.index.*.json", f"{stem}.*.safetensors"):
            for file in sorted(folder.glob(pattern)):
                name = file.name.removeprefix(f"{stem}.safetensors.index.").removeprefix(f"{stem}.")
                return re.sub(r"-\d+-of-\d+$", "", name.split(".")[0])
    return None


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most bytes of a component's weights on disk; float32 if unknown."""
    sizes: Counter[str] = Counter()
    for file in weight_files(folder):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                sizes[tensor["dtype"]] += last - first
    most = max(sizes, key=lambda name: sizes[name], default="F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)


def weight_files(folder: Path) -> list[Path]:
    """The files that diffusers or transformers will load: one, or the shards that an index names."""
    name = variant(folder)
    middle = f".{name}" if name else ""
    for stem in STEMS:
        if (file := folder / f"{stem}{middle}.safetensors").exists():
            return [file]
        index = folder / f"{stem}.safetensors.index{middle}.json"
        if index.exists():
            shards = _read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError(f"model.path: {index}: expected a weight_map of files")
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise UserError(f"model.path: {folder}: expected weights in .safetensors files, found none")


def transformer_fingerprint(folder: Path) -> str:
    """A fingerprint of the files that the transformer of a pipeline is loaded from."""
    return fingerprint_of_files((file.name, file) for file in weight_files(folder / "transformer"))


def _read_object(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"model.path: {file}: expected an object, got {type(found).__name__}")
    return found


def _must_exist(file: Path) -> None:
    if not file.exists():
        raise UserError(f"model.path: {file} is missing")


def _check_length(file: Path) -> None:
    """A safetensors file says in its header how long it is."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        try:
            header = json.loads(opened.read(length) if length < size else b"")
            end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"model.path: {file} is damaged, it has no safetensors header") from None
    if size < 8 + length + end:
        raise UserError(f"model.path: {file} is cut short: expected {8 + length + end} bytes, got {size}")


def check_sizes(model: PipelineModel, recipe: Recipe) -> None:
    """Raises UserError where the model has no pictures of a size that the recipe names, or no room for its
    text."""
    most = getattr(model, "max_text_length", None)
    if most is not None and model.text_length > most:
        raise UserError(
            f"model.text_length: expected at most {most} for {model.name}, got {model.text_length}"
        )
    for size in recipe.rollout.sizes:
        model.latent_shape(size)
    if recipe.evaluate.resolution:
        model.latent_shape(recipe.evaluate.resolution, "evaluate.resolution")


def check_size(name: str, resolution: Resolution, multiple: int, largest: int | None, key: str) -> None:
    """Raises UserError where a model has no pictures of this size. key: of the recipe that says so."""
    for side in height_width(resolution):
        if side % multiple:
            below = max(side - side % multiple, multiple)
            raise UserError(
                f"{key}: expected a multiple of {multiple} for {name}, got {side} "
                f"(next to it: {below}, {below + multiple})"
            )
        if largest is not None and side > largest:
            raise UserError(f"{key}: expected at most {largest} for {name}, got {side}")


def check_family(family: type, pipeline: str) -> None:
    """Raises TypeError that lists everything which the class in the table's row of `pipeline` lacks."""
    said = ("name", "pipeline", "lora_targets", "text_length")
    lacks = [name for name in said if not hasattr(family, name)]
    lacks += sorted(getattr(family, "__abstractmethods__", ()))
    named = getattr(getattr(family, "pipeline", None), "__name__", pipeline)
    if named != pipeline:
        lacks.append(f"pipeline = {pipeline}, got {named}")
    if lacks:
        raise TypeError(f"{family.__module__}.{family.__name__} lacks: {', '.join(lacks)}")
