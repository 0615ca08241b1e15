"""A diffusers pipeline as the trainer sees it. Each family is a subclass in a file of its own.

Latents are the tensor in which the pipeline draws its noise, one image (C, h, w): what a transformer wants
packed into tokens is packed and unpacked in `velocity`. So a sample has the noise that the pipeline draws
from a generator with the sample's seed.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models import checks, negative, prompt_cache
from crd_fast.models.base import CLIP_TOKENS, FlowModel, states_and_pooled
from crd_fast.models.components import with_weights
from crd_fast.models.prompt_reader import PromptReader, Reading, load_tokenizers
from crd_fast.out_of_memory import as_out_of_memory
from crd_fast.sizes import Resolution, height_width

logger = logging.getLogger("crd_fast")


class PipelineModel(FlowModel):
    """What the families share: loading, prompts, the schedule, decoding.

    Loads in the order that needs least memory: `__init__` reads configs alone, `encode` has only the text
    encoders, `load` brings transformer and VAE. Base weights and text encoders are in bfloat16 when LoRA
    trains in bf16, else in float32; the VAE is in float32.

    Attributes of a family: name; pipeline: its class; lora_targets: the attention projections; text_length:
    tokens of a prompt unless the recipe says otherwise; unquantized: layers inside blocks that stay;
    optional: components it does without; joins_rows: outside its blocks a batch is one sequence;
    heeds_flow_sigmas: leaves the noise levels to a scheduler whose config has `use_flow_sigmas`.
    device: by default the GPU, if there is one.
    """

    pipeline: type[DiffusionPipeline]
    text_length: int
    unquantized: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    joins_rows = False
    heeds_flow_sigmas = False

    def __init__(self, folder: Path, recipe: Recipe, device: torch.device | None = None):
        self.folder, self.config = folder, recipe.model
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = recipe.train.precision == "bf16" and recipe.model.method == "lora"
        half = half or recipe.model.dtype == "bf16"
        self.dtype = torch.bfloat16 if half else torch.float32
        if recipe.model.text_length != "default":
            self.text_length = recipe.model.text_length
        self.index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        checks.check_scheduler(folder)
        self.scheduler = self._scheduler()
        self.pipe = self._skeleton()
        self.lora_loader = self.pipeline
        self.size_multiple = self._size_multiple()

    # -- what a family says ---------------------------------------------------------------------------

    def _size_multiple(self) -> int:
        """Images have sides of a multiple of this. Two latents make a token in most families."""
        return 2 * self.pipe.vae_scale_factor

    def max_size(self) -> int | None:
        """The largest side in pixels, where the network has one."""
        return None

    def _latent(self, height: int, width: int) -> tuple[int, int, int]:
        """The latent's shape for a picture's height and width in pixels."""
        scale = self.pipe.vae_scale_factor
        return (self.pipe.vae.config.latent_channels, height // scale, width // scale)

    @abstractmethod
    def _encode(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, torch.Tensor]:
        """One prompt, tensors without a batch axis. pipe: with text encoders, on `self.device`."""

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the network, or in its weights: nothing is guided away from."""
        return bool(self.transformer.config.get("guidance_embeds") or self.index.get("is_distilled"))

    def _as_encoded(self, prompt: str) -> str:
        """Under which text it is encoded and cached: a negative prompt as any other, in most families."""
        return negative.unmarked(prompt)

    def _reading(self, tokenizer: Any, tokens: int) -> Reading:
        """How the pipeline gives prompts to a tokenizer whose text encoder reads so many tokens."""
        return Reading(tokenizer, str, tokens)

    def _to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE decodes them."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (config.shift_factor or 0.0)

    def _tokens(self, resolution: Resolution) -> int:
        """The number of tokens of an image."""
        height, width = height_width(resolution)
        return (height // self.size_multiple) * (width // self.size_multiple)

    def _shift(self, steps: int, resolution: Resolution) -> float:
        """mu of the schedule's shift, by the number of image tokens."""
        config = self.scheduler.config
        return calculate_shift(
            self._tokens(resolution),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def _steps(self, steps: int) -> dict:
        """What the pipeline gives to `set_timesteps` for its own schedule."""
        if self.heeds_flow_sigmas and self.scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps}
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}

    def _time(self, sigma: torch.Tensor) -> torch.Tensor:
        """Time in 0 to 1 for networks that multiply it by 1000, rounded where their pipelines round it.

        They have 0 to 1000 in the network's dtype and divide by 1000: in bfloat16 that is another number than
        sigma in bfloat16, which the network would round a second time.
        """
        device = sigma.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
        return (sigma * 1000).to(dtype) / 1000

    def longest_embeddings(self, prompts: int) -> dict[str, torch.Tensor]:
        return states_and_pooled(self.transformer.config, prompts, self.text_length, self.dtype)

    # -- what the trainer asks ------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def transformer(self) -> Any:  # type: ignore[override]
        return self.pipe.transformer

    def latent_shape(self, resolution: Resolution, key: str = "rollout.resolution") -> tuple[int, int, int]:
        """(C, h, w) for images of this size. UserError, about the recipe's `key`, if there can be none."""
        checks.check_size(self.name, resolution, self.size_multiple, self.max_size(), key)
        return self._latent(*height_width(resolution))

    def sigmas(self, steps: int, resolution: Resolution) -> torch.Tensor:
        """The pipeline's own noise levels: (steps + 1,), falling to 0."""
        settings = self._steps(steps)
        if self.scheduler.config.use_dynamic_shifting:
            settings["mu"] = self._shift(steps, resolution)
        self.scheduler.set_timesteps(**settings)
        return self.scheduler.sigmas.clone()

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of P prompts on the host, each tensor with a first axis of P.

        From the cache; what is not there yet is encoded first. The empty prompt is encoded as the pipeline
        encodes its empty negative prompt.
        """
        for _ in range(3):  # another run's cap may remove one before it is read
            self.encode(prompts)
            keys = map(self._as_encoded, prompts)
            found = [found for prompt in keys if (found := self._prompts.get(prompt)) is not None]
            if len(found) == len(prompts):
                return {key: torch.stack([embeddings[key] for embeddings in found]) for key in found[0]}
        raise UserError(
            f"model.prompt_cache: {self._prompts.folder}: other runs remove prompts as soon as they are "
            "encoded; name a folder of its own, or raise model.prompt_cache_gb"
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, height, width, 3), float32 in [0, 1], on the host.

        The VAE is on the device only meanwhile, and decodes one image at a time: whole, as the pipeline does,
        and from the first for which there is no memory on in tiles, whose seams change pictures a little.
        """
        vae = self.pipe.vae.to(self.device)
        images = []
        for latent in latents.to(self.device, vae.dtype).split(1):
            image = self._decoded(vae, latent)
            images.append(self._pixels(image).cpu())
        if self.device.type != "cpu":
            vae.to("cpu")
        return torch.cat(images)

    def _decoded(self, vae: Any, latent: torch.Tensor) -> torch.Tensor:
        try:
            with as_out_of_memory():
                return vae.decode(self._to_vae(latent), return_dict=False)[0]
        except torch.OutOfMemoryError:
            if vae.use_tiling:
                raise
        # here, where the error no longer holds what the failed attempt computed
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        vae.enable_tiling()
        logger.warning(
            "warning: no memory to decode pictures whole; from now on they are decoded in tiles, which "
            "changes them a little (model.vae_tiling)"
        )
        return vae.decode(self._to_vae(latent), return_dict=False)[0]

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        return self.pipe.image_processor.postprocess(images, output_type="pt").permute(0, 2, 3, 1)

    # -- loading --------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizers(self) -> dict[str, Any]:
        """By name. Raises UserError for one without a vocabulary."""
        return load_tokenizers(self.folder, self.index)

    @functools.cached_property
    def prompt_reader(self) -> PromptReader:  # type: ignore[override]
        encoders = {
            name.replace("text_encoder", "tokenizer"): n for name, (_, n) in self.text_encoders().items()
        }
        return PromptReader(
            self._reading(tokenizer, encoders[name])
            for name, tokenizer in self.tokenizers.items()
            if name in encoders
        )

    @functools.cached_property
    def _prompts(self) -> prompt_cache.PromptCache:
        return prompt_cache.open_cache(
            self.config.prompt_cache, self.encoder_identity(), self.config.prompt_cache_gb
        )

    @torch.no_grad()
    def encode(
        self,
        prompts: Iterable[str],
        ahead: Iterable[str] = (),
        tracked: Callable[[list[str]], Iterable[str]] = iter,
    ) -> None:
        """Encodes the prompts that the cache does not have, then frees the text encoders.

        Where it lacks any, those of `ahead` as well, as long as all together are within the cache's cap.
        """
        asked = list(prompts)
        if self.distilled and any(map(negative.is_marked, asked)):
            raise UserError(
                f"prompts: {negative.KEY}: guidance is distilled into this {self.name}, expected prompts "
                "without"
            )
        cache, now = self._prompts, set(prompts := list(map(self._as_encoded, asked)))
        if all(prompt in cache for prompt in now):
            return
        wanted = list(dict.fromkeys([*prompts, *map(self._as_encoded, ahead)]))
        missing = [prompt for prompt in wanted if prompt not in cache]
        sizes = list(map(cache.size, wanted))
        held, largest = sum(sizes), max(sizes)
        with self._text_encoders() as pipe:
            for prompt in tracked(missing):
                if prompt not in now and held + largest > cache.limit:
                    continue
                # one at a time: how a prompt comes out must not depend on its neighbours
                embeddings = self._encode(pipe, prompt)
                cache.put(prompt, {key: v.cpu().contiguous() for key, v in embeddings.items()}, wanted)
                held += cache.size(prompt)
                largest = max(largest, cache.size(prompt))
            del pipe

    @contextmanager
    def _text_encoders(self) -> Iterator[DiffusionPipeline]:
        """The pipeline with its text encoders, which are gone afterwards, on the GPU if they fit there."""
        absent = {name: None for name, part in self.index.items() if isinstance(part, list) and not part[0]}
        loaded = {
            name: with_weights(getattr(transformers, kind), self.folder / name, self.dtype)
            for name, (kind, _) in self.text_encoders().items()
        }
        given = absent | loaded | {"transformer": self.pipe.transformer, "vae": None}
        pipe = self.pipeline.from_pretrained(self.folder, **{**self.tokenizers, **given})
        encoders = list(loaded.values())
        loaded.clear()
        given.clear()
        device, size = self._device, sum(p.nbytes for encoder in encoders for p in encoder.parameters())
        if device.type == "cuda":
            torch.cuda.empty_cache()
            if not encodes_on_gpu(size, torch.cuda.mem_get_info()[0]):
                self._device = torch.device("cpu")  # slow, but only once
        logs = diffusers.utils.logging
        verbosity = logs.get_verbosity()
        logs.set_verbosity_error()  # it warns of what is truncated, prompt by prompt
        try:
            for encoder in encoders:
                encoder.to(self.device)
            yield pipe
        finally:
            self._device = device
            logs.set_verbosity(verbosity)
        encoders.clear()
        del pipe, encoder
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, checkpointing: float, quantize: Callable[..., None] | None = None) -> None:
        """Transformer and VAE, as the recipe wants them.

        quantize: in place of `crd_fast.models.quantize.quantize`, and called like it.
        """
        transformer = self.pretrained("transformer", self.dtype)
        transformer.requires_grad_(False).eval()
        if self.config.quantization != "none":
            home = torch.device("cpu") if self.config.streaming else self.device
            if quantize is None:
                from crd_fast.models import quantize as module

                quantize = module.quantize
            quantize(
                transformer, self.config.quantization, self.dtype, self.device, self.unquantized, home=home
            )
        self.place(transformer, self.config, self.device, checkpointing)
        vae: Any = self.pretrained("vae", torch.float32)
        vae.requires_grad_(False).eval()
        if self.config.vae_tiling == "always":
            vae.enable_tiling()
        self.pipe.register_modules(transformer=transformer, vae=vae)

    def pretrained(self, component: str, dtype: torch.dtype) -> torch.nn.Module:
        """A component of diffusers with its weights. A plan puts one without them in its place.

        Raises UserError where its config and its weights do not go together.
        """
        return with_weights(self.component_class(component), self.folder / component, dtype)

    def text_encoders(self) -> dict[str, tuple[str, int]]:
        return {
            name: (part[1], CLIP_TOKENS if "CLIP" in part[1] else self.text_length)
            for name, part in self.index.items()
            if isinstance(part, list) and part[0] == "transformers" and name.startswith("text_encoder")
        }

    def encoder_identity(self) -> dict[str, str | int]:
        """What makes the same embeddings: text encoders and tokenizers, and how they are used."""
        parts = [
            name for name, part in self.index.items() if isinstance(part, list) and part[0] == "transformers"
        ]
        return {
            "family": self.name,
            "text_length": self.text_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "encoders": prompt_cache.fingerprint([self.folder / part for part in sorted(parts)]),
        }

    def component_class(self, component: str) -> Any:
        """The class of diffusers that the pipeline's index names."""
        return getattr(diffusers, self.index[component][1])

    def _empty(self, component: str) -> torch.nn.Module:
        cls = self.component_class(component)
        with torch.device("meta"):
            return cls.from_config(cls.load_config(self.folder, subfolder=component))

    def _skeleton(self) -> DiffusionPipeline:
        """The pipeline without weights: its shapes, its packing, its image processor."""
        arguments = {
            key: None if isinstance(value, list) else value
            for key, value in self.index.items()
            if not key.startswith("_")
        }
        arguments |= {
            "transformer": self._empty("transformer"),
            "vae": self._empty("vae"),
            "scheduler": self.scheduler,
        }
        return self.pipeline(**arguments)

    def _scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        found = self.index["scheduler"][1]
        if found != "FlowMatchEulerDiscreteScheduler":
            raise UserError(
                f"{self.folder / 'scheduler'}: expected FlowMatchEulerDiscreteScheduler, got {found}"
            )
        return FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")


def encodes_on_gpu(weights: int, free: int) -> bool:
    """Whether text encoders of so many bytes work there, with a fifth more for what they compute."""
    return weights + weights // 5 <= free
