"""Measures a built-in model and writes its card.

    python -m tools.builtin_card --curve runs/pretrain/curve.jsonl
    python -m tools.builtin_card --model builtin-ocr --curve runs/pretrain-ocr/curve.jsonl

Writes README.md, curve.jsonl and curve.png into the model's folder. What the card says of correctness is
measured by this script, on 384 images, with the rollout's own sampler.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

from crd_fast.models.builtin import KINDS, BuiltinModel
from crd_fast.prompts import signs, world
from crd_fast.prompts.geneval_metadata import draw_prompts
from crd_fast.run.machine import cpu_name, git_commit
from tools import pretrain_builtin, pretrain_builtin_ocr
from tools.pretraining import CAPTION_DROPOUT, GUIDANCE, Stage

matplotlib.use("Agg")
IMAGES = 384

CARD = """# The built-in model

A text-conditional flow model of {transformer:.1f} M parameters (diffusers' `SD3Transformer2DModel`, 32 x 32
pixels, patch 4, width 128, 5 layers) with a T5 encoder of {text:.1f} M (transformers' `T5EncoderModel`, 2
layers, whole words). It draws coloured shapes in a 2 x 2 grid from prompts in GenEval's six categories. It
is there so that training can be tried, tested and studied without a GPU or a download; it is of no use
beyond that.

## Data

Rendered on the fly by `crd_fast.prompts.world`: 5 shapes, 6 colours, {train} training prompts and {held_out}
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

SIGNS_CARD = """# The built-in model that draws signs

A text-conditional flow model of {transformer:.1f} M parameters (diffusers' `SD3Transformer2DModel`,
{width} x {height} pixels, patch 4, width 128, 5 layers) with a T5 encoder of {text:.1f} M (transformers'
`T5EncoderModel`, 2 layers). It draws a word of 3 to 5 letters on a sign: `a sign that says "CAT"`, with a
colour before `sign` and a style after the word if you like, as in `a red sign that says "CAT" in serif`. It
is there so that training with a real OCR reward can be tried, tested and studied without a GPU or a
download; it is of no use beyond that.

Colours: {colors}. Styles: {styles}.

The quoted word is spelled for the text encoder: one token a letter, which says the letter and its place
from the word's middle. The other words are whole tokens.

## Data

Rendered on the fly by `crd_fast.prompts.signs` in fonts that come with matplotlib, DejaVu Sans Mono and
Computer Modern Typewriter; size, place, ink and shade vary. {real:.0%} of the words are drawn from {train}
English ones, the rest are random letters. {held_out} other words are held out: neither pretraining nor the
training prompts ever ask for one.

## Training

`python -m tools.pretrain_builtin_ocr`, seed 0: flow matching, batch {batch}, AdamW, averaged weights,
{dropout:.0%} of the captions dropped, in these stages:

{stages}

Beside the flow's loss a linear head, used in pretraining only, tells from the states after block
{read_block} which letter each patch is part of, at every noise level, with weight {read_weight:g}: so the
model looks up a letter where it draws it. Without the head, and with letters of different widths, none was
readable after 1,800 steps; which of the two changes mattered more was not tried.

In the last stage a share of the captions have one or more letters exchanged. That makes the model
unreliable the way web captions make large models unreliable: guidance shows that it knows how to spell,
without guidance it does so less often. This is the gap that reward training closes.

![Loss and held-out OCR score during pretraining](curve.png)

## Correctness

Mean `ocr` reward (1 - edit distance / length, read by PaddleOCR's recogniser in `word` mode) on {images}
held-out prompts, one image each, 10 Euler steps.

{table}

Measured on {cpu}, commit {commit}: `python -m tools.builtin_card --model builtin-ocr`.
"""


def markdown_table(header: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def correctness_table(model: BuiltinModel) -> str:
    entries = draw_prompts(world.prompts(True), np.random.default_rng(0), IMAGES)
    measured = {scale: pretrain_builtin.correctness(model, entries, scale) for scale in GUIDANCE}
    header = ["", *(f"guidance {scale:g}" for scale in GUIDANCE)]
    names = [*world.TAGS, "overall", "clean"]
    return markdown_table(header, [[name, *(f"{measured[s][name]:.3f}" for s in GUIDANCE)] for name in names])


def ocr_table(model: BuiltinModel) -> str:
    scores = [pretrain_builtin_ocr.ocr_score(model, scale, IMAGES) for scale in GUIDANCE]
    return markdown_table(
        ["", *(f"guidance {scale:g}" for scale in GUIDANCE)], [["ocr", *(f"{score:.3f}" for score in scores)]]
    )


def stage_table(stages: dict[str, Stage]) -> str:
    header = ["stage", "steps", "learning rate", "sigma", "captions exchanged"]
    rows = []
    for name, stage in stages.items():
        sigma = f"sigmoid(N({stage.sigma_mean:g}, {stage.sigma_std:g}))"
        rate = f"{stage.learning_rate:g}"
        if stage.decay_share:
            rate += f", to 0 over the last {stage.decay_share:.0%}" if stage.decay_share < 1 else ", to 0"
        rows.append([name, stage.steps, rate, sigma, stage.caption_noise])
        if isinstance(stage, pretrain_builtin.WorldStage):
            rows[-1].insert(4, " ".join(f"{weight:g}" for weight in stage.category_weights))
    if len(rows[0]) > len(header):
        header.insert(4, "category weights")
    return markdown_table(header, rows)


def plot(curve: list[dict], ylabel: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    left.plot([r["step"] for r in curve], [r["loss"] for r in curve])
    left.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    for scale in GUIDANCE:
        measured = [r for r in curve if f"guidance_{scale}" in r]
        values = [r[f"guidance_{scale}"] for r in measured]
        overall = [value["overall"] if isinstance(value, dict) else value for value in values]
        right.plot([r["step"] for r in measured], overall, marker="o", label=f"guidance {scale:g}")
    right.set(xlabel="step", ylabel=ylabel, ylim=(0, 1))
    right.legend()
    figure.savefig(path, dpi=110)


def world_card(model: BuiltinModel) -> str:
    return CARD.format(
        **common(model),
        train=sum(map(len, world.prompts(False).values())),
        held_out=sum(map(len, world.prompts(True).values())),
        batch=pretrain_builtin.BATCH,
        read=pretrain_builtin.READ_STEPS,
        stages=stage_table(pretrain_builtin.STAGES),
        table=correctness_table(model),
    )


def signs_card(model: BuiltinModel) -> str:
    return SIGNS_CARD.format(
        **common(model),
        height=signs.HEIGHT,
        width=signs.WIDTH,
        colors=", ".join(signs.COLORS),
        styles=", ".join(f"in {style}" for style in signs.STYLES),
        real=pretrain_builtin_ocr.REAL_WORDS,
        train=len(signs.words(False)),
        held_out=len(signs.words(True)),
        batch=pretrain_builtin_ocr.BATCH,
        read_block=pretrain_builtin_ocr.READ_BLOCK + 1,
        read_weight=pretrain_builtin_ocr.READ_WEIGHT,
        stages=stage_table(pretrain_builtin_ocr.STAGES),
        table=ocr_table(model),
    )


def common(model: BuiltinModel) -> dict:
    return {
        "transformer": sum(p.numel() for p in model.transformer.parameters()) / 1e6,
        "text": sum(p.numel() for p in model.text_encoder.parameters()) / 1e6,
        "dropout": CAPTION_DROPOUT,
        "images": IMAGES,
        "cpu": cpu_name(),
        "commit": git_commit(),
    }


CARDS = {"builtin": (world_card, "held-out correctness"), "builtin-ocr": (signs_card, "held-out OCR score")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curve", type=Path, required=True, help="curve.jsonl of the pretraining")
    parser.add_argument("--model", choices=CARDS, default="builtin")
    options = parser.parse_args()
    curve = {}  # a resumed run repeats the steps since its last checkpoint: the last word counts
    for line in options.curve.read_text().splitlines():
        record = json.loads(line)
        curve[record["step"]] = record
    curve = [curve[step] for step in sorted(curve)]
    kind = KINDS[options.model]
    write, measured = CARDS[options.model]
    (kind.folder / "curve.jsonl").write_text("".join(json.dumps(record) + "\n" for record in curve))
    plot(curve, measured, kind.folder / "curve.png")
    (kind.folder / "README.md").write_text(write(BuiltinModel.load(kind)), encoding="utf-8")


if __name__ == "__main__":
    main()
