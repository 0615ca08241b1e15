"""crd-fast init."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crd_fast.commands.rendered import TEMPLATES, rendered
from crd_fast.commands.terminal import say
from crd_fast.doctor.hub import GATED
from crd_fast.errors import UserError, did_you_mean
from crd_fast.run.new_files import check_new, write_new
from crd_fast.worlds import WORLDS

if TYPE_CHECKING:
    from crd_fast.config import Recipe
    from crd_fast.plan.gpus import Card

# What rewards must be told: the address of `serve-reward`, and that of vLLM with a model.
SETTINGS = {
    "http": '{url: "http://127.0.0.1:8701"}   # where crd-fast serve-reward listens',
    "vlm": '{url: "http://127.0.0.1:8000/v1", model: Qwen/Qwen2.5-VL-7B-Instruct}   # of a server you run',
}
JUDGES = ("colorfulness", "naturalness")  # of what is written, but for the one that is trained on


def init(
    folder: Annotated[
        Path, typer.Argument(help="Where to write. Nothing in it is overwritten.", metavar="FOLDER")
    ] = Path("."),
    model: Annotated[
        str,
        typer.Option(
            help="A model that recipes ship for, like sd3.5-medium, flux.1-dev or builtin, or its hub id; or "
            "a folder that holds a pipeline."
        ),
    ] = "sd3.5-medium",
    gpu: Annotated[
        str, typer.Option(metavar="CARD|SIZE", help="The card you have, like rtx-4090, or its memory, 24GB.")
    ] = "rtx-4090",
    reward: Annotated[
        str, typer.Option(help="mine: a function to write; or one that ships, like ocr or pickscore.")
    ] = "mine",
) -> None:
    """Write a commented recipe, a reward with a test, and prompts; say what comes next."""
    from crd_fast.config import load_recipe

    path = Path(model).expanduser().resolve() if Path(model).expanduser().is_dir() else None
    base, card = base_recipe(short_name(model) if path is None else nearest(path), gpu)
    files, extended = chosen(model, reward), load_recipe(base)
    settings = {
        "model": model,
        "path": None if path is None else json.dumps(str(path)),  # JSON is YAML
        "resolution": None if path is None else smaller_resolution(path, extended),
        "card": gpu,
        "card_in_shell": shlex.quote(gpu),
        "reward": "your own" if reward == "mine" else reward,
        "base": base,
        "for_card": "" if card is None else " for this card",
        "extended": extended,
        "judges": [judge for judge in JUDGES if judge != reward],
        **files,
    }
    written = {"recipe.yaml": rendered("recipe.yaml", settings)}
    names = ["my_reward.py", "test_my_reward.py"] if reward == "mine" else []
    names += [name for name in (files["prompts"], files["heldout"]) if name.endswith(".txt")]
    for name in names:
        template = TEMPLATES / (f"{name}.txt" if name.endswith(".py") else name)
        written[name] = template.read_text(encoding="utf-8")
    for name in written:
        check_new(folder / name, "init")
    for name, text in written.items():
        write_new(folder / name, "init", text.encode())
    say(f"wrote {', '.join(written)} in {folder}")
    for line in next_steps(folder, gpu, reward, str(path or extended.model.path), card is not None):
        say(line)


def short_name(model: str) -> str:
    """The short name of a hub id that recipes ship for; anything else unchanged."""
    from crd_fast.config import load_recipe, recipes_by_model

    if "/" in model:
        for name, recipes in recipes_by_model().items():
            if load_recipe(next(iter(recipes.values()))).model.path.lower() == model.lower():
                return name
    return model


def nearest(path: Path) -> str:
    """The model with recipes that is most like a pipeline on disk: the first of its family."""
    from crd_fast.models import family_of
    from crd_fast.models.checks import read_index

    return next(iter(family_of(str(path), read_index(path)).configs.values()))


def smaller_resolution(path: Path, extended: Recipe) -> str | None:
    """`rollout.resolution` as YAML where a pipeline on disk has no pictures as large as the recipe's."""
    from crd_fast.models import sizes_at_most

    sizes = sizes_at_most(path, extended)
    if sizes == list(extended.rollout.sizes):
        return None
    return json.dumps(sizes if len(sizes) > 1 else sizes[0])  # JSON is YAML


def base_recipe(model: str, gpu: str) -> tuple[str, Card | None]:
    """The recipe that ships for the model and at most the card's memory; the card where one is named."""
    from crd_fast.config import recipes_by_model
    from crd_fast.plan.gpus import GIB, parse_gpu

    if model in WORLDS:
        return model, None
    memory, card = parse_gpu(gpu)
    models = recipes_by_model()
    if model not in models:
        known = [*WORLDS, *models]
        hint = did_you_mean(model, known) or f"; known: {', '.join(known)}"
        folder = ", and there is no such folder" if "/" in model else ""
        raise UserError(f"--model: no recipe ships for {model!r}{folder}{hint}")
    shown = math.ceil(memory / GIB)  # a card may show a little less than it is sold with
    fitting = [name for size, name in models[model].items() if size <= shown]
    if not fitting:
        raise UserError(
            f"--gpu {gpu}: the smallest recipe of {model} is for {min(models[model])} GB, expected such "
            "a card"
        )
    return fitting[-1], card


def chosen(model: str, reward: str) -> dict[str, str]:
    """What the recipe says of reward and prompts."""
    from crd_fast.config import WORLD_REWARDS
    from crd_fast.rewards import REWARDS

    if reward != "mine" and reward not in REWARDS:
        hint = did_you_mean(reward, REWARDS) or f"; known: mine, {', '.join(REWARDS)}"
        raise UserError(f"--reward: unknown reward {reward!r}{hint}")
    if reward in WORLD_REWARDS and model not in WORLDS:
        instead = "; for other models: geneval_mask2former" if reward.startswith("geneval") else ""
        raise UserError(f"--reward {reward}: scores pictures of {', '.join(WORLDS)} alone{instead}")
    own = {"prompts": "prompts.txt", "heldout": "heldout.txt", "kinds": "; also .csv, .jsonl, .json"}
    if model in WORLDS:  # a small model knows the words of its own world alone
        own = {"prompts": model, "heldout": f"{model}-heldout", "kinds": ""}
    if reward == "mine":
        return own | {"key": '"my_reward.py:score"', "settings": "1.0"}
    if reward in SETTINGS:
        return own | {"key": reward, "settings": SETTINGS[reward]}
    listed = {"key": reward, "settings": "1.0", "kinds": ""}
    if model in WORLDS:
        return own | listed | ({"settings": "{mode: word}"} if reward == "ocr" else {})
    if reward.startswith(("ocr", "easyocr")):
        settings = "{mode: scene, workers: auto}"
        return listed | {"prompts": "ocr-words", "heldout": "ocr-words-heldout", "settings": settings}
    if reward.startswith("geneval"):
        return listed | {"prompts": "geneval", "heldout": "geneval-heldout"}
    return own | listed


def next_steps(folder: Path, gpu: str, reward: str, path: str, named: bool) -> list[str]:
    """The commands that follow."""
    steps = [] if folder == Path(".") else [f"cd {shlex.quote(str(folder))}"]
    if any(name in path for name in GATED):
        steps += [f"# accept the licence at https://huggingface.co/{path}, once, and then", "hf auth login"]
    if reward == "mine":
        steps += ["# write my_reward.py, and", "pytest   # pip install pytest, where there is none"]
    if path not in WORLDS:
        comment = "   # memory, hours, disk" if named else ""
        steps.append(f"crd-fast plan recipe.yaml --gpu {shlex.quote(gpu)}{comment}")
    return ["next:", *(f"  {step}" for step in [*steps, "crd-fast train recipe.yaml"])]
