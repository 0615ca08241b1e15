"""The page a run leaves behind: `report.html`, one file that needs no network.

It is made from what lies in the run's folder alone, so it can be written for a run that was stopped, that is
still going, or that was copied from another machine.
"""

from __future__ import annotations

import base64
import io
import math
import os
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.run.new_files import write_atomically
from crd_fast.run.report.charts import TEMPLATES, charts
from crd_fast.run.report.held_out import base_note, changes, headline, judged, prompts_note, trained_on
from crd_fast.run.report.run import Run, number, read_json, read_run
from crd_fast.run.report.warnings import warnings
from crd_fast.run.report.words import duration, label, signed

OURS = "· crd-fast"  # how the page's title ends
COLUMNS = 8  # tiles a row in samples/*.png
MAX_TILES = 24
MAX_TILE_PIXELS = 256


# --- samples


def samples(run: Run) -> dict[str, Any]:
    """The first and the last grid, cut into tiles; {} where there are none.

    A pair has its prompt and `images`: (iteration, data URL), two of them, or one while there is one grid.
    """
    grids = sorted((run.folder / "samples").glob("[0-9]*.png"))
    if not grids:
        return {}
    captions = run.folder / "samples" / "prompts.json"
    prompts = read_json(captions, run) if captions.is_file() else None
    prompts = [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
    cut = [(int(grid.stem), _tiles(grid, len(prompts), run)) for grid in dict.fromkeys((grids[0], grids[-1]))]
    cut = [(iteration, tiles) for iteration, tiles in cut if tiles]
    if not cut:
        return {}
    (before, first), (after, last) = cut[0], cut[-1]
    count = min(len(first), len(last))
    shown = min(count, MAX_TILES)
    picked = [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]  # spread over all prompts
    pairs = [
        {
            "prompt": prompts[i] if i < len(prompts) else "",
            "images": [(iteration, _data_url(tiles[i])) for iteration, tiles in cut],
        }
        for i in picked
    ]
    pixelated = first[0].width < MAX_TILE_PIXELS // 2
    return {"before": before, "after": after, "pairs": pairs, "count": count, "pixelated": pixelated}


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
    tile.thumbnail((MAX_TILE_PIXELS, MAX_TILE_PIXELS))
    buffer = io.BytesIO()
    tile.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- the page


def facts(run: Run) -> list[tuple[str, str]]:
    """Short answers to: how much, how long, where."""
    last = run.metrics[-1]["iteration"] if run.metrics else 0
    planned = f" of {run.planned}" if run.planned and run.planned != last else ""
    found = [("iterations", f"{last}{planned}")]
    rollout = run.config.get("rollout") or {}
    prompts, samples = rollout.get("prompts_per_iteration"), rollout.get("samples_per_prompt")
    if run.trained and isinstance(prompts, int) and isinstance(samples, int):
        found.append(("images trained on", f"{len(run.trained) * prompts * samples:,}"))
    spent = [number(row, key) for row in run.metrics for key in row if key.startswith("seconds_")]
    seconds = sum(value for value in spent if math.isfinite(value))
    if seconds:
        found.append(("time", duration(seconds)))
    peak = max((number(row, "peak_rss_bytes") for row in run.trained), default=math.nan)
    if math.isfinite(peak):
        found.append(("peak memory", f"{peak / 2**30:.1f} GiB"))
    device = run.environment.get("gpu") or run.environment.get("cpu")
    if device:
        found.append(("device", str(device)))
    return found


def settings(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of a dotted name and a value as YAML writes it."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += settings(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            rows.append((f"{prefix}{key}", value))
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
            rows.append((f"{prefix}{key}", text.removesuffix("...\n").strip()))
    return rows


def _is_ours(path: Path) -> bool:
    """Whether a page was written here, by its title."""
    try:
        return f"{OURS}</title>" in path.read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return False


def write_report(run: Path) -> Path:
    """Writes `run`/report.html and returns its path.

    run: a folder that `crd-fast train` writes: config.yaml, and as far as they are there metrics.jsonl,
    evaluations/, samples/, warnings.txt and environment.json. Raises UserError if the folder is no run, or
    has a report.html that is none of ours.
    """
    read = read_run(Path(run))
    path = read.folder / "report.html"
    if os.path.lexists(path) and not _is_ours(path):
        raise UserError(f"{path}: is there already and was not written by crd-fast; it is left alone")
    found, judges = changes(read), judged(read)
    tiles = samples(read)
    config = {
        name: value if isinstance(value, dict) else {name: value} for name, value in read.config.items()
    }
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    page = pages.get_template("report.html").render(
        name=read.folder.resolve().name,
        headline=headline(read, found),
        facts=facts(read),
        warnings=warnings(read, found, judges),
        changes=found,
        judges=judges,
        evaluated=read.evaluated,
        notes=[prompts_note(read), base_note(read)] if read.evaluated else [],
        held_out=not trained_on(read),
        charts=charts(read, judges),
        samples=tiles,
        sections={name: settings(values) for name, values in config.items()},
        environment=settings(read.environment),
        label=label,
        signed=signed,
    )
    write_atomically(path, page)
    return path
