"""Flow models, as the trainer sees them: the built-in one, and families of diffusers pipelines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.base import FlowModel
from crd_fast.models.streaming import repeated_blocks
from crd_fast.models.targets import check_targets, lora_targets
from crd_fast.once import hush
from crd_fast.sizes import Resolution, at_most
from crd_fast.worlds import WORLDS

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from crd_fast.models.pipeline import PipelineModel

# By the class in the pipeline's model_index.json: the file here, the class in it, the family's usual name.
FAMILIES = {
    "StableDiffusion3Pipeline": ("sd3", "SD3Model", "Stable Diffusion 3 and 3.5"),
    "FluxPipeline": ("flux", "FluxModel", "FLUX.1"),
    "Flux2KleinPipeline": ("flux2", "Flux2KleinModel", "FLUX.2-klein"),
    "QwenImagePipeline": ("qwen_image", "QwenImageModel", "Qwen-Image"),
    "ZImagePipeline": ("z_image", "ZImageModel", "Z-Image"),
    "SanaPipeline": ("sana", "SanaModel", "Sana"),
}


def load_model(
    recipe: Recipe,
    prompts: Iterable[str] = (),
    ahead: Iterable[str] = (),
    tracked: Callable[[list[str]], Iterable[str]] = iter,
    check: Callable[[FlowModel], None] = lambda model: None,
) -> FlowModel:
    """The model that `model.path` names, on the GPU if there is one.

    prompts, ahead, tracked: as of `FlowModel.encode`; they are encoded first, while no transformer is in
    memory. check: is given the model before that, to ask it which prompts it takes and how much it reads.
    Raises UserError, before anything is loaded or encoded, if the path is no pipeline or not of a supported
    family, if a file of it is missing or cut short, if a tokenizer has no vocabulary, if the resolution or
    the LoRA targets do not fit, if the GPU has no bfloat16 where the recipe wants it.
    """
    from crd_fast.models import checks

    checks.check_gpu(recipe)
    if recipe.model.path in WORLDS:
        model = _load_builtin(recipe)
        check(model)
        return model
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # bars of their own would run through ours
        library.utils.logging.disable_progress_bar()
    hush("diffusers", "transformers")
    transformers.utils.logging.set_verbosity_error()  # it warns of image processors that nobody asked for
    folder, model_class = find_pipeline(recipe.model.path)
    checks.check_files(folder)
    model = model_class(folder, recipe)
    checks.check_sizes(model, recipe)
    if recipe.model.method == "lora":
        targets = lora_targets(model, recipe)
        check_targets(model.transformer, targets, within_blocks=recipe.model.streaming and model.joins_rows)
    check(model)
    model.encode([*prompts, ""], ahead, tracked)
    model.load(recipe.train.checkpointing)
    choose_attention(model.transformer, recipe.model.attention)
    return model


def sizes_at_most(folder: Path, recipe: Recipe) -> list[Resolution]:
    """The recipe's sizes of training pictures, none of them larger than a pipeline on disk draws.

    Of its configs alone. Raises UserError where one is missing, and for a family that is not supported.
    """
    from crd_fast.models import checks

    checks.check_configs(folder)
    model = family_of(str(folder), checks.read_index(folder))(folder, recipe, torch.device("cpu"))
    return list(dict.fromkeys(at_most(size, model.max_size()) for size in recipe.rollout.sizes))


def choose_attention(network: ModelMixin, backend: str) -> None:
    """Sets diffusers' attention backend. Raises UserError where it cannot be used."""
    if backend == "default":
        return
    processors = [getattr(module, "processor", None) for module in network.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise UserError(
            f"model.attention: expected default for {type(network).__name__}, which has one, got {backend}"
        )
    try:
        network.set_attention_backend(backend)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model.attention: {backend}: {str(error).strip().splitlines()[0]}") from None


def compile_blocks(network: torch.nn.Module, backend: str = "inductor") -> None:
    """torch.compile of the blocks that repeat, with room for every set of weights.

    Of their forward alone: what brings a block's weights to the device before it, streaming or sharding, runs
    as it is written. Weights are the compiled code's inputs, so blocks of one class share it. The compiled
    forwards with and without gradient are different code: equal weights then predict equally to rounding, not
    to the bit. What varies from call to call, the length of a batch's prompts or how many of its rows are
    anchored, is made an unknown of the code when it first changes: compiled for each size, blocks would soon
    reach torch's limit and run as they are written.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for block in repeated_blocks(network):
        block.forward = torch.compile(block.forward, dynamic=None, backend=backend)


def _load_builtin(recipe: Recipe) -> FlowModel:
    from crd_fast.models.builtin import KINDS, BuiltinModel

    check_builtin(recipe)
    model = BuiltinModel.load(KINDS[recipe.model.path])
    prepare_builtin(model, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model


def check_builtin(recipe: Recipe) -> None:
    """Raises UserError for what a built-in model is too small for."""
    if recipe.model.quantization != "none":
        raise UserError(
            f"model.quantization: expected none for the built-in model, got {recipe.model.quantization}"
        )


def prepare_builtin(model, recipe: Recipe, device: torch.device) -> None:
    """A built-in model's transformer as the recipe wants it, on the device or streamed to it."""
    if recipe.model.dtype == "bf16":
        # diffusers' own `to` warns that layers may have to stay in float32: there are none
        torch.nn.Module.to(model.transformer, torch.bfloat16)
    model.place(model.transformer, recipe.model, device, recipe.train.checkpointing)
    choose_attention(model.transformer, recipe.model.attention)


def find_pipeline(path: str) -> tuple[Path, type]:
    """The pipeline's folder, downloaded if it is a hub id, and the adapter of its family.

    Raises UserError for what is neither, and for a family that is not supported.
    """
    from crd_fast.models import checks

    if Path(path).is_dir():
        index = checks.read_index(Path(path))
        return Path(path), family_of(path, index)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise UserError(
            f"model.path: expected {', '.join(WORLDS)}, the folder of a diffusers pipeline or a hub "
            f"id like org/name, got {path!r}; supported: {supported()}"
        )
    from diffusers import DiffusionPipeline

    try:
        found = family_of(path, DiffusionPipeline.load_config(path))
        return Path(DiffusionPipeline.download(path)), found
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path!r} {_refusal(path, error)}") from None


def _refusal(path: str, error: BaseException) -> str:
    """Why a hub id could not be had, and what to do: the reason lies below what diffusers raises."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{path}"
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, GatedRepoError):
            return f"asks for its licence to be accepted: do so at {page}, then `hf auth login`"
        if isinstance(below, RepositoryNotFoundError):
            return f"is no folder here, and not to be seen at {page}: if it is private, `hf auth login`"
        below = below.__cause__ or below.__context__
    reason = str(error).strip().splitlines()[0][:200]
    return f"is no folder here, and cannot be downloaded: {reason}"


def family_of(path: str, index: dict) -> type[PipelineModel]:
    """The class for a pipeline by its model_index.json. Raises UserError for one that is not supported."""
    from crd_fast.models.checks import check_components

    name = index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"model.path: {path}: {name} is not supported; supported: {supported()}")
    found = family(name)
    check_components(path, index, found)
    return found


def family(pipeline: str) -> type[PipelineModel]:
    """The class in the row of a pipeline's name. Raises TypeError that lists all it lacks."""
    from crd_fast.models.checks import check_family

    module, name, _ = FAMILIES[pipeline]
    found = getattr(import_module(f"crd_fast.models.{module}"), name)
    check_family(found, pipeline)
    return found


def supported() -> str:
    """The families' names, for messages."""
    return ", ".join(f"{name} ({pipeline})" for pipeline, (_, _, name) in FAMILIES.items())
