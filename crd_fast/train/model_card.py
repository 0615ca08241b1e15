"""What a model card says of a run: facts for the template, from the run's folder and the checkpoint alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import ModelCardData, constants, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from crd_fast import __version__
from crd_fast.models import checks
from crd_fast.reward_weights import trained_weights, weight_of
from crd_fast.run.report import facts
from crd_fast.run.report.held_out import (
    REWARD,
    base_note,
    change_of,
    changes,
    headline,
    prompts_note,
)
from crd_fast.run.report.run import Run, read_run
from crd_fast.run.report.warnings import warnings
from crd_fast.run.report.words import label, signed
from crd_fast.run.scores import LEVEL
from crd_fast.sizes import height_width
from crd_fast.train.export import Trained
from crd_fast.yaml_files import dump_yaml

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
IN_CACHE = re.compile(r"models--([\w.-]+)--([\w.-]+)")  # a folder in the hub's cache, for its id
WHICH = {
    "policy": "the weights",
    "ema": "an exponential moving average of the weights (`evaluate.weights: ema`)",
    "sampler": "a slow average of the weights (`evaluate.weights: sampler`)",
    "old": "an average of the weights (`evaluate.weights: old`)",
}
METHODS = {
    "crd": "Centered Reward Distillation ([arXiv 2603.14128](https://arxiv.org/abs/2603.14128))",
    "nft": "DiffusionNFT",
    "awm": "advantage-weighted matching",
    "flow_matching": "flow matching weighed by the reward",
    "dpo": "online diffusion DPO",
}
SECTIONS = ("model", "rollout", "advantage", "loss", "snapshots", "train", "evaluate")
OF_THE_MACHINE = ("path", "prompt_cache", "prompt_cache_gb", "trackers", "profile")
# By pipeline: how it is called for guidance of strength w by the empty prompt; e: the distilled guidance.
GUIDANCE = {
    "StableDiffusion3Pipeline": lambda w, e: {"guidance_scale": w},
    "FluxPipeline": lambda w, e: {"guidance_scale": e} | _true_guidance(w),
    "Flux2KleinPipeline": lambda w, e: {"guidance_scale": w},
    "QwenImagePipeline": lambda w, e: _true_guidance(w),
    "ZImagePipeline": lambda w, e: {"guidance_scale": w - 1},
    "SanaPipeline": lambda w, e: {"guidance_scale": w},
}


def _true_guidance(w: float) -> dict[str, Any]:
    return {"true_cfg_scale": w} | ({"negative_prompt": ""} if w > 1 else {})


def values(trained: Trained, run: Run | None, base_model: str | None = None) -> dict[str, Any]:
    """What the template asks for, all but the pictures. base_model: the base's id on the hub, if it is known.

    Paths of this machine and settings of rewards, which may name servers, are left out.
    """
    recipe, pipeline = trained.recipe, trained.pipeline("hub")
    base_id = base_model or hub_id(recipe.model.path)
    licence, license_note = license_of(recipe.model.path, base_id)
    front = ModelCardData(
        base_model=base_id,
        base_model_relation="finetune" if trained.full else "adapter",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "text-to-image",
            "diffusers",
            *([] if trained.full else ["lora"]),
            "reinforcement-learning",
            "crd-fast",
        ],
        **cast(dict[str, Any], licence),
    )
    height, width = height_width(recipe.evaluation_size)
    call = {"num_inference_steps": recipe.evaluate.steps, "height": height, "width": width}
    call |= GUIDANCE.get(pipeline, lambda w, e: {})(
        recipe.evaluate.guidance_scale, recipe.model.guidance_embedding
    )
    if recipe.model.text_length != "default":
        call["max_sequence_length"] = recipe.model.text_length
    if pipeline == "SanaPipeline":
        call["use_resolution_binning"] = False  # or it draws at a size of its own and scales that
    return {
        "front": front.to_yaml(),
        "base": base_id or Path(recipe.model.path).name,
        "license_note": license_note,
        "pipeline": pipeline,
        "transformer": trained.state["model"]["class"],
        "full": trained.full,
        "call": ", ".join(f"{key}={value!r}" for key, value in call.items()),
        "iteration": trained.iteration,
        "which": WHICH[recipe.evaluate.weights],
        "method": METHODS[recipe.loss.method],
        "quantization": recipe.model.quantization,
        "rank": recipe.model.lora_rank,
        "version": __version__,
        "rewards": [(without_folders(name), weight_of(value)) for name, value in recipe.rewards.items()],
        "judges": [without_folders(name) for name in recipe.eval_rewards],
        "settings": settings(trained),
        **said_of(run),
    }


def run_until(trained: Trained) -> Run | None:
    """The run as it was when the checkpoint was made; None where the checkpoint has left it."""
    if trained.run is None:
        return None
    run = read_run(trained.run)
    return dataclasses.replace(
        run,
        metrics=[row for row in run.metrics if row["iteration"] <= trained.iteration],
        warned=[line for line in run.warned if warned_at(line) <= trained.iteration],
    )


def warned_at(line: str) -> int:
    """The iteration that a line of warnings.txt begins with; 0 where it has none."""
    found = re.match(r"iteration (\d+):", line)
    return int(found[1]) if found else 0


def said_of(run: Run | None) -> dict[str, Any]:
    """Headline, table, notes, warnings and facts of a run."""
    if run is None or not run.metrics:
        return {"headline": "", "rows": [], "notes": [], "warnings": [], "facts": []}
    found = changes(run)
    notes = [prompts_note(run), base_note(run)] if run.evaluated else []
    # that it went on after this checkpoint is no fault of the checkpoint's
    said = [line for line in warnings(run, found) if not line.startswith("This run has done")]
    return {
        "headline": without_folders(headline(run, found)),
        "rows": rows(run),
        "notes": [note for note in notes if note],
        "warnings": [without_folders(line) for line in said],
        "facts": [(name, without_folders(value)) for name, value in facts(run)],
    }


def rows(run: Run) -> list[dict[str, str]]:
    """The reward and its parts, judges, and what they report: before, after, and the paired difference."""
    if len(run.evaluated) < 2:
        return []
    names = [key.removeprefix("eval/") for key in run.evaluated[-1] if key.startswith("eval/")]
    order = [name for name in names if name.startswith("reward/")]
    order += [name for name in names if name.startswith("judge/")]
    order += [name for name in names if "/" not in name and name not in (REWARD, "reward_std", "images")]
    given = run.config.get("rewards") or {}
    untrained = set(given) - set(trained_weights(given))
    found = []
    for name in [REWARD, *order]:
        change = change_of(run, name)
        if change is None:
            continue
        kind, _, own = name.partition("/") if "/" in name else ("", "", name)  # addresses have more of them
        role = {"reward": "trained on", "judge": "judge"}.get(
            kind, "trained on" if name == REWARD else "reported"
        )
        if kind == "reward" and own in untrained:
            role = "weight 0"
        title = "Reward, weighted sum" if name == REWARD else label(without_folders(own))
        places = change.digits
        error = "error not known" if change.error is None else f"± {change.error:.{places}f}"
        sure = f" (p < {LEVEL:g})" if change.compared is not None and change.compared.significant else ""
        found.append(
            {
                "name": title.replace("|", "\\|"),
                "role": role,
                "before": f"{change.before:.{places}f}",
                "after": f"{change.after:.{places}f}",
                "difference": f"{signed(change.difference, places)} {error}{sure}",
            }
        )
    return found


def settings(trained: Trained) -> str:
    """The recipe as YAML, without what is of this machine or of the rewards."""
    kept = trained.recipe.model_dump()
    shown = {
        section: {key: _short(value) for key, value in kept[section].items() if key not in OF_THE_MACHINE}
        for section in SECTIONS
    }
    return dump_yaml(shown, default_flow_style=None, width=100)


def _short(value: Any) -> Any:
    """A file by its name alone, and several with their weights too."""
    if isinstance(value, dict):
        weights: Counter[str] = Counter()  # two files in different folders may have one name
        for name, weight in value.items():
            weights[_short(name)] += weight
        return dict(weights)
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def without_folders(text: str) -> str:
    """Absolute paths in it by the name of their file alone; addresses and fractions stay."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s:;,/]+/)+([^\s:;,/]+)", r"\1", text)


def hub_id(path: str) -> str | None:
    """The id that a model was loaded by, or that its folder in the hub's cache has, else None."""
    if not os.path.isdir(path):
        return path if HUB_ID.fullmatch(path) else None
    found = next(filter(None, map(IN_CACHE.fullmatch, Path(path).parts)), None)
    if found:
        return f"{found[1]}/{found[2]}"
    name = checks.read_index(Path(path)).get("_name_or_path")
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def license_of(path: str, base_id: str | None) -> tuple[dict[str, str], str]:
    """The licence in the front matter of the base's README, as it lies here, and a sentence about it."""
    readme: Any = Path(path) / "README.md"
    if not os.path.isdir(path):
        readme = try_to_load_from_cache(path, "README.md") if HUB_ID.fullmatch(path) else None
    found: dict[str, Any] = {}
    if isinstance(readme, (str, Path)) and Path(readme).is_file():
        try:
            found = metadata_load(readme) or {}
        except (OSError, ValueError, yaml.YAMLError):
            found = {}
    keys = ("license", "license_name", "license_link")
    licence = {key: found[key] for key in keys if isinstance(found.get(key), str)}
    if "license" not in licence:
        return {"license": "other"}, (
            "The licence of the base applies; it was not found beside its weights. See the base's own page, "
            "and name it above."
        )
    link = licence.get("license_link", "")
    if link and "://" not in link:  # of a file in the base's repository
        del licence["license_link"]
        if base_id is not None:
            licence["license_link"] = f"{constants.ENDPOINT}/{base_id}/blob/main/{link}"
    name = licence.get("license_name", licence["license"])
    return licence, f"The licence of the base, {name}, applies."


def copy_grids(run: Run | None, iteration: int, out: Path) -> list[tuple[str, int]]:
    """The run's grids before and, the last until an iteration, after, of evaluations that can be compared.

    Returns name and iteration.
    """
    if run is None:
        return []
    until = [(at, path) for at, path in run.grids() if at <= iteration]
    if not until:
        return []
    chosen = {"before.png": until[0], "after.png": until[-1]} if len(until) > 1 else {"samples.png": until[0]}
    for name, (_, path) in chosen.items():
        shutil.copyfile(path, out / name)
    return [(name, at) for name, (at, _) in chosen.items()]


def forget_folders(config: Path) -> None:
    """Takes the folder that a transformer was loaded from out of its config."""
    said = json.loads(config.read_text(encoding="utf-8"))
    if os.path.isabs(str(said.get("_name_or_path", ""))):
        del said["_name_or_path"]
        config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
