"""Measures the built-in model and writes its card.

    python -m tools.builtin_card --curve runs/pretrain/curve.jsonl

Writes crd_fast/builtin/README.md, curve.jsonl and curve.png. The correctness in the card is measured by this
script, on 384 images, with the rollout's own sampler.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np

from crd_fast import world
from crd_fast.models.builtin import BUILTIN_FOLDER, BuiltinModel
from crd_fast.runlog import cpu_name, git_commit
from tools.pretrain_builtin import BATCH, CAPTION_DROPOUT, READ_STEPS, STAGES, correctness

matplotlib.use("Agg")
IMAGES = 384
GUIDANCE = (1.0, 4.5)

CARD = """# The built-in model

A text-conditional flow model of {transformer:.1f} M parameters (diffusers' `SD3Transformer2DModel`, 32 x 32
pixels, patch 4, width 128, 5 layers) with a T5 encoder of {text:.1f} M (transformers' `T5EncoderModel`, 2
layers, whole words). It draws coloured shapes in a 2 x 2 grid from prompts in GenEval's six categories. It
is there so that training can be tried, tested and studied without a GPU or a download; it is of no use
beyond that.

## Data

Rendered on the fly by `crd_fast.world`: 5 shapes, 6 colours, {train} training prompts and {held_out}
held-out ones. Held-out prompts combine what no training prompt combines: in `colors` 5 of the 30 pairs of a
colour and a shape, in `color_attr` one in five combinations of two known pairs, in `position` one in five
(shape, relation, shape) triples, in `two_object` one in four ordered pairs of shapes, and for single objects
and counts, of which the world has too few, one in four wordings.

## Training

`python -m tools.pretrain_builtin`, seed 0. First the text encoder alone learns, in {read} steps on prompts
without images, to tell each shape's colour, number, relation and partner at its word. Then flow matching,
batch {batch}, AdamW, averaged weights, {dropout:.0%} of the captions dropped, in these stages:

{stages}

In the last stage a share of the captions are exchanged for others of the same category. That makes the model
unreliable the way web captions make large models unreliable: guidance shows that it knows how to follow the
prompt, without guidance it does so less often. This is the gap that reward training closes.

![Loss and held-out correctness during pretraining](curve.png)

## Correctness

Share of correct images on {images} held-out prompts, one image each, 10 Euler steps, by GenEval's rules;
`clean` is correct and nothing else in the picture. The standard error of `overall` is about 0.025.

{table}

Measured on {cpu}, commit {commit}: `python -m tools.builtin_card`.
"""


def markdown_table(header: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def correctness_table(model: BuiltinModel) -> str:
    entries = world.draw_prompts(True, np.random.default_rng(0), IMAGES)
    measured = {scale: correctness(model, entries, scale) for scale in GUIDANCE}
    header = ["", *(f"guidance {scale:g}" for scale in GUIDANCE)]
    names = [*world.TAGS, "overall", "clean"]
    return markdown_table(header, [[name, *(f"{measured[s][name]:.3f}" for s in GUIDANCE)] for name in names])


def stage_table() -> str:
    rows = []
    for name, stage in STAGES.items():
        values = dataclasses.asdict(stage)
        weights = " ".join(f"{w:g}" for w in values["category_weights"])
        sigma = f"sigmoid(N({stage.sigma_mean:g}, {stage.sigma_std:g}))"
        rate = f"{stage.learning_rate:g}"
        if stage.decay_share:
            rate += f", to 0 over the last {stage.decay_share:.0%}" if stage.decay_share < 1 else ", to 0"
        rows.append([name, stage.steps, rate, sigma, weights, stage.caption_noise])
    header = ["stage", "steps", "learning rate", "sigma", "category weights", "captions exchanged"]
    return markdown_table(header, rows)


def plot(curve: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    left.plot([r["step"] for r in curve], [r["loss"] for r in curve])
    left.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    for scale in GUIDANCE:
        measured = [r for r in curve if f"guidance_{scale}" in r]
        overall = [r[f"guidance_{scale}"]["overall"] for r in measured]
        right.plot([r["step"] for r in measured], overall, marker="o", label=f"guidance {scale:g}")
    right.set(xlabel="step", ylabel="held-out correctness", ylim=(0, 1))
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curve", type=Path, required=True, help="curve.jsonl of the pretraining")
    options = parser.parse_args()
    curve = {}  # a resumed run repeats the steps since its last checkpoint: the last word counts
    for line in options.curve.read_text().splitlines():
        record = json.loads(line)
        curve[record["step"]] = record
    curve = [curve[step] for step in sorted(curve)]
    (BUILTIN_FOLDER / "curve.jsonl").write_text("".join(json.dumps(record) + "\n" for record in curve))
    plot(curve, BUILTIN_FOLDER / "curve.png")
    model = BuiltinModel.load()
    card = CARD.format(
        transformer=sum(p.numel() for p in model.transformer.parameters()) / 1e6,
        text=sum(p.numel() for p in model.text_encoder.parameters()) / 1e6,
        train=sum(map(len, world.prompts(False).values())),
        held_out=sum(map(len, world.prompts(True).values())),
        batch=BATCH,
        dropout=CAPTION_DROPOUT,
        read=READ_STEPS,
        stages=stage_table(),
        images=IMAGES,
        table=correctness_table(model),
        cpu=cpu_name(),
        commit=git_commit(),
    )
    (BUILTIN_FOLDER / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
