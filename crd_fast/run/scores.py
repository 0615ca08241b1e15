"""evaluations/000020.jsonl: what every picture of an evaluation got, and two evaluations compared by it.

Evaluations have the same prompts and seeds each time, so two of them are compared picture by picture: the
difference of the means has the error of the differences, which is smaller than that of either mean. Pictures
of one prompt are not independent of one another, so prompts are the units of every error here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crd_fast.errors import UserError
from crd_fast.run.new_files import write_atomically

EVALUATIONS = "evaluations"
CATEGORY_MEANS = ("overall", "clean")  # means of the categories' means, as GenEval has them
LEVEL = 0.05  # two-sided, of what is called a difference


@dataclass(frozen=True)
class Scores:
    """One evaluation, picture by picture; every field is of N pictures.

    index: which of the evaluation's prompts. trained: whether the prompt is among those that are trained on,
    None where that is not known. categories: "" where a prompt has none. values: by name, float64 (N,):
    `reward`, each `reward/NAME` and `judge/NAME`, and what rewards report for each picture; NaN where it was
    not scored.
    """

    index: Sequence[int]
    prompts: Sequence[str]
    seeds: Sequence[int]
    categories: Sequence[str]
    trained: Sequence[bool | None]
    values: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """What tells a picture from others: its prompt and its seed."""
        return list(zip(self.prompts, self.seeds))

    def trained_on(self) -> tuple[int, int] | None:
        """How many of how many prompts are among those that are trained on; None where it is not known."""
        known = dict(zip(self.prompts, self.trained))
        if None in known.values():
            return None
        return sum(map(bool, known.values())), len(known)


def scores_path(run: Path, iteration: int) -> Path:
    return run / EVALUATIONS / f"{iteration:06d}.jsonl"


def guided_base_path(run: Path) -> Path:
    """The scores of the base with guidance, evaluated once before training."""
    return run / EVALUATIONS / "guided_base.jsonl"


def write_scores(path: Path, scores: Scores) -> None:
    """One object a line, one line a picture. Replaces what an earlier try of the iteration has left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(len(scores)):
        line = {
            "prompt": int(scores.index[i]),
            "seed": int(scores.seeds[i]),
            "category": scores.categories[i],
            "trained_on": scores.trained[i],
            "scores": {name: _known(values[i]) for name, values in scores.values.items()},
            "text": scores.prompts[i],
        }
        lines.append(json.dumps(line) + "\n")
    write_atomically(path, "".join(lines))


def scores_of(run: Path, iteration: int) -> Scores | None:
    """The scores of a run's evaluation; None where they are not there or damaged."""
    return _read_if_intact(scores_path(run, iteration))


def guided_base_scores(run: Path) -> Scores | None:
    """The scores of the base with guidance; None where they are not there or damaged."""
    return _read_if_intact(guided_base_path(run))


def _read_if_intact(path: Path) -> Scores | None:
    try:
        return read_scores(path)
    except (OSError, UserError):
        return None


def read_scores(path: Path) -> Scores:
    """Raises UserError where the file is not what `write_scores` writes, OSError where there is none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        names = list(lines[0]["scores"])
        if any(list(line["scores"]) != names for line in lines):
            raise ValueError
        return Scores(
            [int(line["prompt"]) for line in lines],
            [str(line["text"]) for line in lines],
            [int(line["seed"]) for line in lines],
            [str(line["category"]) for line in lines],
            [line["trained_on"] for line in lines],
            {name: np.array([_value(line["scores"][name]) for line in lines]) for name in names},
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise UserError(f"{path}: not the scores of an evaluation") from None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _value(known: float | None) -> float:
    return math.nan if known is None else float(known)


# --- comparison


@dataclass(frozen=True)
class Comparison:
    """A measure's mean in two evaluations of the same prompts and seeds.

    error: standard error of the difference, NaN where one prompt cannot tell it. prompts, pictures: how many.
    """

    before: float
    after: float
    error: float
    prompts: int
    pictures: int

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def p(self) -> float:
        """The p-value of a two-sided paired t-test over prompts. NaN: unknown."""
        return p_value(self.difference, self.error, self.prompts)

    @property
    def significant(self) -> bool:
        return self.p < LEVEL

    def direction(self, among: int = 1) -> int:
        """1 or -1 where it rose or fell by more than chance makes one of so many, otherwise 0."""
        if not self.p < LEVEL / among:
            return 0
        return 1 if self.difference > 0 else -1


def compare(before: Scores, after: Scores, name: str, category: str | None = None) -> Comparison:
    """`name` in two evaluations, paired picture by picture; of one category alone where it is given.

    Raises UserError where the two have other prompts or seeds, or one lacks the measure.
    """
    matched = _matched(before, after)
    for scores in (before, after):
        if name not in scores.values:
            raise UserError(f"{name}: expected a measure of both evaluations, got {', '.join(scores.values)}")
    first, last = before.values[name], after.values[name][matched]
    chosen = _scored(_chosen(before, category), name, first, last)
    weights = weights_of(before, name, chosen)
    difference, error, prompts = mean_and_error(
        (last - first)[chosen], units_of(before.prompts)[chosen], weights
    )
    mean = float(weights @ first[chosen])
    return Comparison(mean, mean + difference, error, prompts, int(chosen.sum()))


def measure_of(scores: Scores, metric: str) -> tuple[str, str | None] | None:
    """Under which name, and of which category, the pictures have a metric (without `eval/`).

    None where it is not a mean of what the pictures got.
    """
    if metric == "reward_mean":
        return "reward", None
    if metric in scores.values:
        return metric, None
    if metric in scores.categories and "overall" in scores.values:
        return "overall", metric
    return None


def compare_metric(before: Scores | None, after: Scores | None, metric: str) -> Comparison | None:
    """A metric of two evaluations; None where it cannot be said of single pictures, or they are no pairs."""
    measure = measure_of(before, metric) if before is not None else None
    if before is None or after is None or measure is None:
        return None
    try:
        return compare(before, after, *measure)
    except UserError:
        return None


def shown_difference(before: Scores | None, after: Scores | None, metric: str) -> str:
    """`+0.012 ± 0.004*`, paired, with a star where p < 0.05; nothing where the error is not known."""
    both = compare_metric(before, after, metric)
    if both is None or math.isnan(both.error):
        return ""
    return f"{both.difference:+.3f} ± {both.error:.3f}{'*' if both.significant else ' '}"


def shown_change(values: tuple[float, float], start: Scores | None, end: Scores | None, metric: str) -> str:
    """The same, or the difference of the two values alone; nothing where one of them is not known."""
    before, after = values
    difference = "" if math.isnan(after - before) else f"{after - before:+.3f}"
    return shown_difference(start, end, metric) or difference


def shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def error_of(scores: Scores | None, metric: str) -> float:
    """Standard error of a metric in one evaluation, NaN where it is not known."""
    measure = measure_of(scores, metric) if scores else None
    return mean_of(scores, *measure)[1] if scores and measure else math.nan


def mean_of(scores: Scores, name: str, category: str | None = None) -> tuple[float, float]:
    """A measure's mean in one evaluation and its standard error, NaN for one prompt.

    Both NaN where no picture was scored.
    """
    chosen = _chosen(scores, category) & ~np.isnan(scores.values[name])
    if not chosen.any():
        return math.nan, math.nan
    weights = weights_of(scores, name, chosen)
    mean, error, _ = mean_and_error(scores.values[name][chosen], units_of(scores.prompts)[chosen], weights)
    return mean, error


def gap(before: Scores, after: Scores, name: str, other: str) -> Comparison | None:
    """How much further `name` rose than `other`, both in standard deviations of `before`'s pictures.

    before is 0 in the result. None where one of them is the same for all pictures, which has no deviation.
    Raises UserError as `compare` does.
    """
    matched = _matched(before, after)
    rise = np.zeros(len(before))
    for measure, sign in ((name, 1), (other, -1)):
        size = deviation(before, measure)
        if size is None:
            return None
        changes = after.values[measure][matched] - before.values[measure]
        chosen = _scored(_chosen(before, None), measure, changes)
        rise[chosen] += sign * weights_of(before, measure, chosen) * len(before) * changes[chosen] / size
    mean, error, prompts = mean_and_error(rise, units_of(before.prompts), np.full(len(rise), 1 / len(rise)))
    return Comparison(0.0, mean, error, prompts, len(rise))


def deviation(scores: Scores, name: str) -> float | None:
    """The standard deviation over pictures; None if all have one value."""
    values = scores.values[name]
    values = values[~np.isnan(values)]
    return float(values.std()) if len(values) and np.ptp(values) else None


def mean_and_error(values: np.ndarray, units: np.ndarray, weights: np.ndarray) -> tuple[float, float, int]:
    """The weighted mean, its standard error with `units` independent of one another, and how many those are.

    values, units (whole numbers), weights (sum 1): (N,). With G units and e_g the sum over unit g of
    weight * (value - mean), the error is sqrt(G / (G - 1) sum_g e_g^2): for equal weights and as many values
    in each unit that is the standard error of the units' means. NaN for one unit.
    """
    mean = float(weights @ values)
    units = np.unique(units, return_inverse=True)[1]
    residuals = np.bincount(units, weights * (values - mean))
    count = len(residuals)
    if count < 2:
        return mean, math.nan, count
    return mean, math.sqrt(count / (count - 1) * float(residuals @ residuals)), count


def weights_of(scores: Scores, name: str, chosen: np.ndarray) -> np.ndarray:
    """What each chosen picture counts in the measure's mean, (chosen,), sum 1."""
    count = int(chosen.sum())
    if name not in CATEGORY_MEANS:
        return np.full(count, 1 / count)
    categories = np.unique(np.array(scores.categories, dtype=object)[chosen].astype(str), return_inverse=True)
    sizes = np.bincount(categories[1])
    return 1 / (len(sizes) * sizes[categories[1]])


def p_value(difference: float, error: float, units: int) -> float:
    """Two-sided, of Student's t with units - 1 degrees of freedom; NaN where the error is not known."""
    if math.isnan(error) or math.isnan(difference):
        return math.nan
    if error == 0:
        return 0.0 if difference else 1.0
    from scipy.special import stdtr  # here: it takes a second, and few need it

    return float(2 * stdtr(units - 1, -abs(difference) / error))


def _chosen(scores: Scores, category: str | None) -> np.ndarray:
    found = np.array([category in (None, other) for other in scores.categories])
    if not found.any():
        raise UserError(f"{category}: expected a category of the evaluation, got none of its pictures")
    return found


def _scored(chosen: np.ndarray, name: str, *values: np.ndarray) -> np.ndarray:
    """The chosen pictures for which all values are known. UserError where there is none."""
    chosen = chosen & ~np.isnan(values).any(axis=0)
    if not chosen.any():
        raise UserError(f"{name}: expected pictures that were scored, got none")
    return chosen


def units_of(prompts: Sequence[str]) -> np.ndarray:
    """A number for each picture's prompt, (N,): pictures of one text are one unit, wherever it stands."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])


def _matched(before: Scores, after: Scores) -> np.ndarray:
    """Where each of `before`'s pictures is in `after`, (N,)."""
    place = {picture: i for i, picture in enumerate(after.pictures)}
    missing = [picture for picture in before.pictures if picture not in place]
    if missing or len(before) != len(after):
        raise UserError(
            f"evaluations: expected the same prompts and seeds to pair, got {len(before)} and {len(after)} "
            f"pictures with {len(before) - len(missing)} in common"
        )
    return np.array([place[picture] for picture in before.pictures])
