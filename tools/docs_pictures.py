"""The pictures of README and docs, from a committed run: `python -m tools.docs_pictures`.

docs/example-run is a run of the built-in recipe: metrics, settings, machine, first and last grid.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
RUN = DOCS / "example-run"
TILE, COLUMNS = 32, 8  # pixels, tiles a row of a grid
SHOWN = (1, 3, 7, 8, 14, 15, 20, 21)  # prompts of several objects, where the base errs
CURVES = (
    ("reward_mean", "groups_equal"),
    ("kl", "old_kl"),
    ("implicit_variance", "external_variance"),
    ("old_deviation",),
    ("policy_loss", "kl_loss"),
    ("grad_norm",),
)
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"


def records() -> list[dict]:
    return [json.loads(line) for line in (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tile(grid: Path, number: int) -> np.ndarray:
    row, column = divmod(number, COLUMNS)
    pixels = np.asarray(Image.open(grid).convert("RGB"))
    return pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]


def before_and_after(path: Path) -> None:
    prompts = json.loads((RUN / "prompts.json").read_text(encoding="utf-8"))
    first, *_, last = sorted(RUN.glob("[0-9]*.png"))
    evaluations = [record for record in records() if "eval/overall" in record]
    figure = plt.figure(figsize=(12.5, 3.5), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1))
    axes = left.subplots(2, len(SHOWN))
    for row, (grid, name) in enumerate(((first, "before"), (last, "after"))):
        for column, number in enumerate(SHOWN):
            axis = axes[row, column]
            axis.imshow(tile(grid, number), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(name, fontsize=12)
            if row == 1:
                caption = prompts[number].split(" of ", 1)[1]
                axis.set_xlabel("\n".join(textwrap.wrap(caption, 14)), fontsize=9)
    axis = right.subplots()
    for name, label, color in (
        ("eval/overall", "right by GenEval's rules", BLUE),
        ("eval/clean", "and nothing else", GREY),
    ):
        axis.plot(
            [r["iteration"] for r in evaluations],
            [r[name] for r in evaluations],
            "o-",
            color=color,
            label=label,
        )
    axis.set(xlabel="iteration", ylabel="held-out pictures", ylim=(0, 1))
    axis.legend(loc="lower right", fontsize=9, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def healthy_metrics(path: Path) -> None:
    trained = [record for record in records() if "policy_loss" in record]
    figure, axes = plt.subplots(2, 3, figsize=(12, 5), dpi=100, layout="constrained")
    for axis, names in zip(axes.flat, CURVES):
        for name, color in zip(names, (BLUE, ORANGE)):
            axis.plot([r["iteration"] for r in trained], [r[name] for r in trained], color=color, label=name)
        axis.set_title(", ".join(names), fontsize=10)
        largest = max(record[name] for record in trained for name in names)
        axis.set_ylim(0, largest * (1.3 if len(names) > 1 else 1.1))  # room for a legend
        axis.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axis.legend(fontsize=9, frameon=False, loc="upper right", ncols=2)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("Agg")
    before_and_after(DOCS / "pictures" / "builtin.png")
    healthy_metrics(DOCS / "pictures" / "metrics.png")
