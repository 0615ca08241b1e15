"""The grids of a report: every evaluation's pictures, each with its prompt, beside the base's."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from crd_fast.run.metrics import GUIDED_BASE
from crd_fast.run.report.run import Run, number, read_json
from crd_fast.run.scores import Scores

COLUMNS = 8  # tiles a row in samples/*.png
MAX_TILES = 24
MAX_GRIDS = 6  # that can be chosen, the last one among them
MAX_TILE_PIXELS = 256
SMALL = 128  # pixels below which a tile is shown with its pixels as they are
GUIDED = "guided_base"


@dataclass(frozen=True)
class Grid:
    """One evaluation's pictures.

    key: in the names of the page's elements. name: short, for under a picture; title: said once. urls: a data
    URL a tile; rewards: what each got, None where not known; mean: of the evaluation's rewards, NaN where it
    is not known. width: pixels of a tile in its file.
    """

    key: str
    name: str
    title: str
    urls: list[str]
    rewards: list[float | None]
    mean: float
    width: int


def samples(run: Run) -> dict[str, Any]:
    """The grids of comparable evaluations cut into tiles; {} where there are none.

    fixed: the grids that stand beside the chosen one: the first, and the base with guidance. tabs: those that
    can be chosen, spread over the run, the last at the end. pairs: of each prompt that is shown its
    text and pictures, (grid, whether it is fixed, data URL, reward). count: of tiles; all: of grids.
    """
    captions = run.folder / "samples" / "prompts.json"
    prompts = read_json(captions, run) if captions.is_file() else None
    prompts = [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
    paths = [path for _, path in run.grids()]
    grids = [grid for path in _spread(paths, MAX_GRIDS + 1) if (grid := _grid(path, prompts, run))]
    guided = run.folder / "samples" / f"{GUIDED}.png"
    base = _grid(guided, prompts, run) if guided.is_file() and 0 not in run.left_out else None
    if not grids:
        return {}
    tabs = grids[1:] or grids
    fixed = [*grids[: len(grids) > 1], *([base] if base else [])]
    count = min(len(grid.urls) for grid in fixed + tabs)
    pairs = [
        {
            "prompt": prompts[i] if i < len(prompts) else "",
            "pictures": [(g, g in fixed, g.urls[i], g.rewards[i]) for g in fixed + tabs],
        }
        for i in _spread(range(count), MAX_TILES)
    ]
    return {
        "fixed": fixed,
        "tabs": tabs,
        "pairs": pairs,
        "count": count,
        "all": len(paths),
        "has_rewards": any(reward is not None for grid in fixed + tabs for reward in grid.rewards),
        "pixelated": grids[0].width < SMALL,
    }


def _spread(items, most: int) -> list:
    """So many of the items at most, evenly spread from the first to the last."""
    count, shown = len(items), min(len(items), most)
    return [items[round(i * (count - 1) / max(1, shown - 1))] for i in range(shown)]


def _grid(path: Path, prompts: list[str], run: Run) -> Grid | None:
    """A grid's file; None where it cannot be read, which is said."""
    tiles = _tiles(path, len(prompts), run)
    if not tiles:
        return None
    width = tiles[0].width
    if path.stem == GUIDED:
        first = next((row for row in run.evaluated if f"{GUIDED_BASE}guidance_scale" in row), {})
        scale, mean = (
            number(first, f"{GUIDED_BASE}guidance_scale"),
            number(first, f"{GUIDED_BASE}reward_mean"),
        )
        name = "guided base"
        title = (
            f"the base with guidance scale {scale:g}" if math.isfinite(scale) else "the base with guidance"
        )
        scores = run.guided_base
    else:
        iteration = int(path.stem)
        row = next((row for row in run.evaluated if row["iteration"] == iteration), {})
        start = "start" if run.starts_from_lora else "base"
        name, mean = f"iteration {iteration}" if iteration else start, number(row, "eval/reward_mean")
        title = name if iteration else "iteration 0"
        scores = run.scores.get(iteration)
    urls = [_data_url(tile) for tile in tiles]
    return Grid(path.stem, name, title, urls, _rewards(scores, prompts, len(tiles)), mean, width)


def _rewards(scores: Scores | None, prompts: list[str], count: int) -> list[float | None]:
    """Rewards of an evaluation's first pictures, which its grid shows; None where the prompts differ."""
    if scores is None or list(scores.prompts[: len(prompts)]) != prompts or "reward" not in scores.values:
        return [None] * count
    values = [float(value) for value in scores.values["reward"][:count]]
    return [*values, *[None] * (count - len(values))]


def _tiles(path: Path, prompts: int, run: Run) -> list[Image.Image]:
    """The grid's tiles in row-major order: square ones where the number of prompts is not known."""
    try:
        with Image.open(path) as image:
            grid = image.convert("RGB")
    except (OSError, ValueError, SyntaxError):  # Pillow's answers to a damaged file
        run.problems.append(f"samples/{path.name} could not be read.")
        return []
    columns = min(COLUMNS, prompts) or COLUMNS
    width = max(1, grid.width // columns)
    rows = math.ceil(prompts / columns) if prompts else max(1, grid.height // width)
    height = max(1, grid.height // rows)
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in corners[: prompts or None]]


def _data_url(tile: Image.Image) -> str:
    """Small tiles as they are, others as photographs are kept: a page has hundreds."""
    small = tile.width < SMALL
    tile.thumbnail((MAX_TILE_PIXELS, MAX_TILE_PIXELS))
    buffer = io.BytesIO()
    if small:
        tile.save(buffer, format="png", optimize=True)
    else:
        tile.save(buffer, format="jpeg", quality=88)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
