"""The charts of a report, as inline SVG in the page's own fonts and colours."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crd_fast.run.metrics import GUIDED_BASE
from crd_fast.run.report.held_out import Judged, compared, guidance_scale
from crd_fast.run.report.run import PHASES, Run, number, series
from crd_fast.run.report.words import label
from crd_fast.run.scores import deviation, measure_of

TEMPLATES = Path(__file__).parent / "templates"
# Charts are drawn in the stand-in colours of report.mplstyle; the page's style sheet has the real ones.
INK, GRID, FIRST, SECOND, THIRD, FOURTH = (
    "#000101",
    "#000202",
    "#000303",
    "#000404",
    "#000505",
    "#000606",
)
CSS_COLORS = {INK: "muted", GRID: "line", FIRST: "first", SECOND: "second", THIRD: "third", FOURTH: "fourth"}
LINES = tuple(zip((FIRST, SECOND, THIRD, FOURTH) * 2, "osD^vPX*", ("-",) * 4 + ("--",) * 4))  # told apart
ERROR_BARS: dict[str, Any] = {"markersize": 5, "elinewidth": 1, "capsize": 2}


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
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
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
    """Overall and clean at every evaluation; errors are those of the difference from the first."""
    axes, rows = figure.subplots(), run.evaluated
    names = [name for name in ("overall", "clean") if any(f"eval/{name}" in row for row in rows)]
    for name, (color, marker, _) in zip(names or ["reward_mean"], LINES):
        found = [compared(run, rows[0]["iteration"], row["iteration"], name) for row in rows]
        errors = [0.0 if both is None or math.isnan(both.error) else both.error for both in found]
        x, y = series(rows, "iteration"), series(rows, f"eval/{name}")
        bars = {"yerr": errors if any(errors) else None, "color": color, "marker": marker, **ERROR_BARS}
        axes.errorbar(x, y, label=label(name).lower(), **bars)
    main = (names or ["reward_mean"])[0]
    guided = number(rows[0], f"{GUIDED_BASE}{main}")
    if math.isfinite(guided):
        said = f"base, guidance {guidance_scale(run):g}"
        axes.axhline(guided, color=THIRD, linewidth=1.4, linestyle="--", label=said)
    _legend(axes)


def draw_judges(figure: Figure, run: Run, rows: Sequence[Judged]) -> None:
    """How far the reward and each judge are from their first value, in deviations of its pictures."""
    axes, first = figure.subplots(), run.evaluated[0]["iteration"]
    for row, (color, marker, line) in zip(rows, LINES):
        measure, _ = measure_of(run.scores[first], row.change.name) or (row.change.name, None)
        size = deviation(run.scores[first], measure)
        points = [(first, 0.0, 0.0)]
        for iteration in (other["iteration"] for other in run.evaluated[1:]):
            both = compared(run, first, iteration, row.change.name)
            if both is not None and size is not None:
                error = 0.0 if math.isnan(both.error) else both.error
                points.append((iteration, both.difference / size, error / size))
        x, y, errors = zip(*points)
        bars = {"yerr": errors, "color": color, "marker": marker, "linestyle": line, **ERROR_BARS}
        axes.errorbar(x, y, label=row.label.lower() if row.label[:1].isupper() else row.label, **bars)
    axes.axhline(0, color=INK, linewidth=0.8)
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
    columns = 3 if len(axes.get_legend_handles_labels()[0]) <= 3 else 2
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        borderpad=0,
        handlelength=1.4,
    )


def charts(run: Run, judges: Sequence[Judged] = ()) -> dict[str, Markup]:
    """By name, each chart that the run has data for; the template has their titles."""
    deviation = [("old_deviation", "old deviation"), ("implicit_reward_mean", "implicit reward")]
    # a method that does not need old does not measure it
    deviation = [panel for panel in deviation if any(map(math.isfinite, series(run.trained, panel[0])))]
    losses = [("policy_loss", "policy loss"), ("kl_loss", "KL loss")]
    drawings = {}
    if len(run.evaluated) > 1:
        drawings["heldout"] = draw_heldout
    measured = [row for row in judges if row.rise is not None][: len(LINES)]
    if len(measured) > 1:
        drawings["judges"] = partial(draw_judges, rows=measured)
    if run.trained:
        drawings |= {
            "reward": draw_reward,
            "kl": partial(draw_lines, panels=[("kl", "")]),
            "deviation": partial(draw_lines, panels=deviation),
            "loss": partial(draw_lines, panels=losses),
            "gradient": partial(draw_lines, panels=[("grad_norm", "")]),
            "seconds": draw_seconds,
        }
        if not deviation:
            del drawings["deviation"]
    return {name: svg(draw, run, name) for name, draw in drawings.items()}
