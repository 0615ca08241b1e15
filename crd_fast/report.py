"""The page a run leaves behind: `report.html`, one file that needs no network.

It is made from what lies in the run's folder alone, so it can be written for a run that was stopped, that is
still going, or that was copied from another machine.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from crd_fast.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
COLUMNS = 8  # tiles a row in samples/*.png
MAX_TILES = 24
MAX_TILE_PIXELS = 256
NOT_CATEGORIES = ("overall", "clean", "reward_mean", "reward_std", "images")
PHASES = ("rollout", "reward", "update")
# Charts are drawn in the stand-in colours of report.mplstyle; the page's style sheet has the real ones.
INK, GRID, FIRST, SECOND, THIRD = "#000101", "#000202", "#000303", "#000404", "#000505"
CSS_COLORS = {INK: "muted", GRID: "line", FIRST: "first", SECOND: "second", THIRD: "third"}


# --- what the folder holds


@dataclass
class Run:
    """A run's folder, read. `problems` are sentences about what could not be read."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one an iteration, iteration 0 included
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The iterations that updated the policy: not iteration 0, which is only evaluated."""
        return [row for row in self.metrics if "reward_mean" in row]

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if any(key.startswith("eval/") for key in row)]

    @property
    def planned(self) -> int | None:
        """Iterations the recipe asks for."""
        iterations = (self.config.get("train") or {}).get("iterations")
        return iterations if isinstance(iterations, int) else None


def read_run(folder: Path) -> Run:
    """Reads config.yaml, metrics.jsonl and environment.json. Raises UserError if `folder` is no run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: expected the folder of a run, found no config.yaml in it")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'config.yaml'}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'}: expected sections of settings, got {config!r}")
    run = Run(folder, config)
    _read_metrics(run)
    if (folder / "environment.json").is_file():
        environment = _read_json(folder / "environment.json", run)
        run.environment = environment if isinstance(environment, dict) else {}
    return run


def _read_metrics(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row["iteration"])] = row  # an iteration that a resumed run repeats counts once
        except (ValueError, TypeError, KeyError):
            run.problems.append(f"Line {number} of metrics.jsonl is incomplete and was left out.")
    run.metrics = [rows[iteration] for iteration in sorted(rows)]


def _read_json(path: Path, run: Run) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        run.problems.append(f"{path.relative_to(run.folder)} could not be read.")
        return None


# --- held-out results


@dataclass(frozen=True)
class Change:
    """A held-out quantity at the first and the last evaluation. `error`: standard error of the difference."""

    name: str
    before: float
    after: float
    error: float | None = None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def noise(self) -> float:
        """A difference up to this is not worth a word: two standard errors, 0.03 where they are unknown."""
        return 0.03 if self.error is None else 2 * self.error

    @property
    def plottable(self) -> bool:
        return 0 <= self.before <= 1 and 0 <= self.after <= 1


def number(row: dict[str, Any], key: str) -> float:
    """row[key] as a float; NaN where it is missing or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def standard_error(row: dict[str, Any], key: str, categories: int = 1) -> float | None:
    """Of a share p of n images: sqrt(p (1 - p) / n). None where n is unknown or p is no share.

    categories: how many categories share the evaluated images, for the share of one of them.
    """
    share, images = number(row, f"eval/{key}"), number(row, "eval/images") / categories
    return math.sqrt(share * (1 - share) / images) if 0 <= share <= 1 and images > 0 else None


def changes(run: Run) -> list[Change]:
    """Overall, clean, then every category: those that the first and the last evaluation both have."""
    if not run.evaluated:
        return []
    first, last = run.evaluated[0], run.evaluated[-1]
    names = [key.removeprefix("eval/") for key in last if key.startswith("eval/") and key in first]
    names = [name for name in ("overall", "clean") if name in names] + [
        name for name in names if name not in NOT_CATEGORIES and "/" not in name
    ]
    found = []
    for name in names or ["reward_mean"]:
        before, after = number(first, f"eval/{name}"), number(last, f"eval/{name}")
        if not math.isfinite(before + after):
            continue
        parts = 1 if name in NOT_CATEGORIES else sum(other not in NOT_CATEGORIES for other in names)
        errors = [standard_error(row, name, parts) for row in (first, last)]
        error = None if None in errors else math.hypot(*errors)
        found.append(Change(name, before, after, error))
    return found


def headline(run: Run, found: list[Change]) -> str:
    """The result in one plain sentence."""
    if not found:
        return _training_headline(run)
    main, first, last = found[0], run.evaluated[0], run.evaluated[-1]
    what = "Held-out correctness" if main.name == "overall" else f"Held-out {label(main.name).lower()}"
    if first is last:
        when = f"after iteration {first['iteration']}" if first["iteration"] else "before training"
        error = standard_error(first, main.name)
        return f"{what} {when} is {main.after:.2f}" + (
            "." if error is None else f", standard error {error:.2f}."
        )
    span = f"from {main.before:.2f} to {main.after:.2f} in {counted(last['iteration'] - first['iteration'])}"
    error = "" if main.error is None else f", standard error {main.error:.2f}"
    size = f"({signed(main.difference, 2)}{error})"
    if main.error is not None and abs(main.difference) <= main.noise:
        return f"{what} went {span} {size}, which this evaluation cannot tell from no change."
    return f"{what} {'rose' if main.difference > 0 else 'fell'} {span} {size}."


def _training_headline(run: Run) -> str:
    rewards = [value for value in series(run.trained, "reward_mean") if math.isfinite(value)]
    if not rewards:
        return "No iteration of this run is finished yet."
    end = max(1, len(rewards) // 10)
    first, last = statistics.fmean(rewards[:end]), statistics.fmean(rewards[-end:])
    span = f"went from {first:.2f} to {last:.2f}" if len(rewards) > 1 else f"is {first:.2f}"
    return f"The training reward {span} after {counted(len(rewards))}; held-out prompts were not evaluated."


def warnings(run: Run, found: list[Change]) -> list[str]:
    """What a careful reader would want to be told before believing the headline."""
    by_name = {change.name: change for change in found}
    overall, clean = by_name.get("overall"), by_name.get("clean")
    said = list(run.problems)
    if run.planned and run.metrics and run.metrics[-1]["iteration"] < run.planned:
        said.append(f"This run has done {run.metrics[-1]['iteration']} of {run.planned} iterations.")
    if overall and clean and overall.difference > 0 and clean.difference < -(clean.noise / 2):
        said.append(
            f"Clean correctness fell by {-clean.difference:.2f} while overall correctness rose by "
            f"{overall.difference:.2f}: possible reward hacking. Look for extra objects in the samples."
        )
    for change in found:
        if change.name not in NOT_CATEGORIES and change.difference < -max(0.05, change.noise):
            said.append(f"{label(change.name)} fell by {-change.difference:.2f}.")
    return said + _training_warnings(run, found)


def _training_warnings(run: Run, found: list[Change]) -> list[str]:
    said, rows = [], run.trained
    if len(run.evaluated) > 1 and found and len(rows) >= 10:
        main, fifth, rewards = found[0], len(rows) // 5, series(rows, "reward_mean")
        gain = statistics.fmean(rewards[-fifth:]) - statistics.fmean(rewards[:fifth])
        if gain > 0.05 and main.difference <= 0:
            said.append(
                f"The training reward rose by {gain:.2f} but the held-out result did not: overfitting."
            )
        best = max(run.evaluated, key=lambda row: number(row, f"eval/{main.name}"))
        lost = number(best, f"eval/{main.name}") - main.after
        if lost > main.noise:
            said.append(
                f"The evaluation at iteration {best['iteration']} was {lost:.2f} better than the last."
            )
    flat = sum(value < 1e-6 for value in series(rows, "reward_std"))
    if flat:
        said.append(f"In {flat} of {len(rows)} iterations all samples got the same reward: nothing to learn.")
    limit = (run.config.get("train") or {}).get("max_grad_norm")
    clipped = sum(value > float(limit or math.inf) for value in series(rows, "grad_norm"))
    if clipped > len(rows) / 2:
        said.append(f"The gradient was clipped to {limit} in {clipped} of {len(rows)} iterations.")
    for key in ("reward_mean", "policy_loss", "kl_loss", "grad_norm"):
        bad = [row["iteration"] for row in rows if key in row and not math.isfinite(number(row, key))]
        if bad:
            said.append(f"{label(key)} is not a finite number at iteration {bad[0]}.")
    return said


# --- charts


def series(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [number(row, key) for row in rows]


def svg(draw: Callable[[Figure, Run], None], run: Run, name: str) -> Markup:
    """`draw`'s figure as inline SVG: in the page's fonts and colours, ids made unique by `name`."""
    with (
        matplotlib.style.context(TEMPLATES / "report.mplstyle"),
        matplotlib.rc_context({"svg.hashsalt": name}),
    ):
        figure = Figure(figsize=(5.2, 3.0), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, run)
        for axes in figure.axes:
            last = max(2, run.metrics[-1]["iteration"])
            axes.set_xlim(-0.03 * last, 1.03 * last)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.axes[-1].set_xlabel("iteration")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(
        r'<svg .*?(viewBox="[^"]*").*?>', r"<svg \1>", text[text.index("<svg") :], count=1, flags=re.DOTALL
    )
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--font)", text).replace("xlink:href", "href")
    for marker in (' id="', "url(#", 'href="#'):
        text = text.replace(marker, f"{marker}{name}-")
    for drawn, css in CSS_COLORS.items():
        text = text.replace(drawn, f"var(--{css})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-labelledby="about-{name}" ', 1))


def draw_reward(figure: Figure, run: Run) -> None:
    """Mean of each iteration, a moving mean over it, and a band of one standard deviation of the samples."""
    axes, rows = figure.subplots(), run.trained
    x, mean, std = (series(rows, key) for key in ("iteration", "reward_mean", "reward_std"))
    low, high = [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)]
    axes.fill_between(x, low, high, color=FIRST, alpha=0.13, linewidth=0, label="± one standard deviation")
    window = len(rows) // 20
    smooth = [statistics.fmean(mean[max(0, i - window) : i + window + 1]) for i in range(len(mean))]
    axes.plot(x, mean, color=FIRST, alpha=0.45, linewidth=1, marker="o" if len(rows) == 1 else "")
    axes.plot(x, smooth, color=FIRST, label="mean, smoothed" if window else "mean")
    _legend(axes)


def draw_heldout(figure: Figure, run: Run) -> None:
    """Overall and clean at every evaluation, with standard errors where they are known."""
    axes, rows = figure.subplots(), run.evaluated
    names = [name for name in ("overall", "clean") if any(f"eval/{name}" in row for row in rows)]
    for name, color, marker in zip(names or ["reward_mean"], (FIRST, SECOND), "os"):
        errors = [standard_error(row, name) or 0.0 for row in rows]
        style = {"color": color, "marker": marker, "markersize": 5, "elinewidth": 1, "capsize": 2}
        x, y = series(rows, "iteration"), series(rows, f"eval/{name}")
        axes.errorbar(x, y, yerr=errors if any(errors) else None, label=label(name).lower(), **style)
    _legend(axes)


def draw_lines(figure: Figure, run: Run, panels: Sequence[tuple[str, str]]) -> None:
    """One panel above the other for each (key, name), with the iterations in common."""
    rows = run.trained
    for index, (key, name) in enumerate(panels):
        axes, color = figure.add_subplot(len(panels), 1, index + 1), (FIRST, SECOND)[index]
        marker = "o" if len(rows) == 1 else ""
        axes.plot(series(rows, "iteration"), series(rows, key), color=color, marker=marker)
        axes.yaxis.set_major_locator(MaxNLocator(4 if len(panels) > 1 else 6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("e-0", "e−"))
        axes.tick_params(labelbottom=index == len(panels) - 1)
        if name:
            axes.set_title(name, fontsize=11, loc="left", color=color)


def draw_seconds(figure: Figure, run: Run) -> None:
    """Seconds of each iteration, one phase on top of the other."""
    axes, rows = figure.subplots(), run.trained
    x, base = series(rows, "iteration"), [0.0] * len(rows)
    edges = [start - 0.5 for start in x] + [x[-1] + 0.5]
    for phase, color in zip(PHASES, (FIRST, SECOND, THIRD)):
        seconds = [value if math.isfinite(value) else 0.0 for value in series(rows, f"seconds_{phase}")]
        top = [below + value for below, value in zip(base, seconds)]
        axes.stairs(top, edges, baseline=base, fill=True, color=color, label=phase)
        base = top
    axes.set_ylim(bottom=0)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides no data."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, borderpad=0, handlelength=1.4
    )


def charts(run: Run) -> dict[str, Markup]:
    """By name, each chart that the run has data for; the template has their titles."""
    deviation = [("old_deviation", "old deviation"), ("implicit_reward_mean", "implicit reward")]
    losses = [("policy_loss", "policy loss"), ("kl_loss", "KL loss")]
    drawings = {}
    if len(run.evaluated) > 1:
        drawings["heldout"] = draw_heldout
    if run.trained:
        drawings |= {
            "reward": draw_reward,
            "kl": partial(draw_lines, panels=[("kl", "")]),
            "deviation": partial(draw_lines, panels=deviation),
            "loss": partial(draw_lines, panels=losses),
            "gradient": partial(draw_lines, panels=[("grad_norm", "")]),
            "seconds": draw_seconds,
        }
    return {name: svg(draw, run, name) for name, draw in drawings.items()}


# --- samples


def samples(run: Run) -> dict[str, Any]:
    """The first and the last grid, cut into tiles; {} where there are none.

    A pair has its prompt and `images`: (iteration, data URL), two of them, or one while there is one grid.
    """
    grids = sorted((run.folder / "samples").glob("[0-9]*.png"))
    if not grids:
        return {}
    captions = run.folder / "samples" / "prompts.json"
    prompts = _read_json(captions, run) if captions.is_file() else None
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


def label(name: str) -> str:
    """`two_object` as people write it: `Two object`."""
    text = name.replace("_", " ").replace("kl", "KL").strip()
    return text[:1].upper() + text[1:]


def signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def counted(iterations: int) -> str:
    return f"{iterations} iteration" + ("" if iterations == 1 else "s")


def facts(run: Run) -> list[tuple[str, str]]:
    """Short answers to: how much, how long, where."""
    last = run.metrics[-1]["iteration"] if run.metrics else 0
    planned = f" of {run.planned}" if run.planned and run.planned != last else ""
    found = [("iterations", f"{last}{planned}")]
    rollout = run.config.get("rollout") or {}
    images = rollout.get("prompts_per_iteration"), rollout.get("samples_per_prompt")
    if run.trained and all(isinstance(value, int) for value in images):
        found.append(("images trained on", f"{len(run.trained) * images[0] * images[1]:,}"))
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


def write_report(run: Path) -> Path:
    """Writes `run`/report.html and returns its path.

    run: a folder that `crd-fast train` writes: config.yaml, and as far as they are there metrics.jsonl,
    samples/ and environment.json. Raises UserError if the folder is no run.
    """
    read = read_run(Path(run))
    found = changes(read)
    tiles = samples(read)
    config = {
        name: value if isinstance(value, dict) else {name: value} for name, value in read.config.items()
    }
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    page = pages.get_template("report.html").render(
        name=read.folder.resolve().name,
        headline=headline(read, found),
        facts=facts(read),
        warnings=warnings(read, found),
        changes=found,
        evaluated=read.evaluated,
        images=number(read.evaluated[-1], "eval/images") if read.evaluated else math.nan,
        charts=charts(read),
        samples=tiles,
        sections={name: settings(values) for name, values in config.items()},
        environment=settings(read.environment),
        label=label,
        signed=signed,
    )
    path = read.folder / "report.html"
    unfinished = path.with_suffix(".html.part")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path
