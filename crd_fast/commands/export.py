"""crd-fast export: what was trained, in the form that other programs take."""

from __future__ import annotations

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crd_fast.commands.rendered import rendered
from crd_fast.commands.terminal import console, say

if TYPE_CHECKING:
    from crd_fast.train.export import Trained


def export(
    source: Annotated[str, typer.Argument(help="A run's or a checkpoint's folder.", metavar="SOURCE")],
    to: Annotated[
        Literal["diffusers", "comfyui", "fused", "hub"],
        typer.Option(
            help="diffusers: the LoRA's folder, or the transformer's where all weights were trained. "
            "comfyui: one file. fused: the whole pipeline with the LoRA in its weights. hub: a folder to "
            "upload, with a model card."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder, for comfyui the file. Never overwritten.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Of a run: best, by its held-out score, newest, or an iteration. Default: best where one is "
            "marked, else newest.",
            metavar="best|newest|N",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the model is that the run began with, if it has moved.", metavar="FOLDER"),
    ] = None,
    weights: Annotated[
        Literal["policy", "ema", "sampler", "old"] | None,
        typer.Option(help="Which of a run's sets. Default: those that it evaluated, `evaluate.weights`."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="For the model card: the base's id on the hub, where the run began with a folder.",
            metavar="ORG/NAME",
        ),
    ] = None,
) -> None:
    """Write a run's trained weights for diffusers, for ComfyUI, as a whole pipeline, or for the hub.

    No reward is loaded and nothing is asked of the network, unless the base of `--to fused` has to be
    downloaded.
    """
    from crd_fast.errors import UserError
    from crd_fast.run.new_files import made_beside

    out = out.expanduser()
    if to == "comfyui" and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: expected a name that ends with .safetensors")
    if to != "comfyui" and out.suffix == ".safetensors":
        raise UserError(f"--out {out}: --to {to} writes a folder, expected a name without .safetensors")
    if base_model is not None and to != "hub":
        raise UserError(f"--base-model: is for the model card of --to hub, got --to {to}")
    with (
        made_beside(out, "--out") as partial,
        TemporaryDirectory(dir=partial.parent) as aside,  # whole sets of weights, for which /tmp may be small
        console.status("exporting"),
    ):
        from crd_fast.train import export as exports

        trained = exports.Trained.of(source, checkpoint, model)
        if weights is not None:
            if to == "hub" and weights != trained.recipe.evaluate.weights:
                raise UserError(
                    f"--weights {weights}: expected {trained.recipe.evaluate.weights} for the hub, whose "
                    "scores the model card has; --to diffusers, comfyui and fused take any"
                )
            trained = exports.with_set(trained, weights, Path(aside))
        if to == "hub":
            write_hub(trained, partial, base_model, out.resolve().name)
        else:
            write = {
                "diffusers": exports.copy_weights,
                "comfyui": exports.write_comfyui,
                "fused": exports.write_fused,
            }[to]
            write(trained, partial)
    say(f"wrote {out}: the weights after iteration {trained.iteration}")
    if to == "hub":
        say(
            "read README.md in it, then: "
            + shlex.join(["hf", "upload", "YOUR-NAME/" + out.resolve().name, str(out)])
        )


def write_hub(trained: Trained, out: Path, base_model: str | None, name: str) -> None:
    """The weights, the grids before and after, and README.md, a model card. name: of the model."""
    from crd_fast.train import export, model_card

    run = model_card.run_until(trained)
    values = model_card.values(trained, run, base_model)
    export.copy_weights(trained, out / "transformer" if trained.full else out)
    if trained.full:
        model_card.forget_folders(out / "transformer" / "config.json")
    values["pictures"] = model_card.copy_grids(run, trained.iteration, out)
    card = rendered("model-card.md", values | {"name": name})
    (out / "README.md").write_text(card, encoding="utf-8")
