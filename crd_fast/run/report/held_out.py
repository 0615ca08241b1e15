"""What a run's evaluations say: the first and the last compared picture by picture, reward beside judges."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from crd_fast.reward_weights import trained_weights
from crd_fast.run.hacking import Fall, first_falls, planned_evaluations
from crd_fast.run.metrics import GUIDED_BASE
from crd_fast.run.report.run import Run, number, series
from crd_fast.run.report.words import counted, digits, label, signed
from crd_fast.run.scores import LEVEL, Comparison, compare_metric, deviation, error_of, gap, measure_of

NOT_CATEGORIES = ("overall", "clean", "reward_mean", "reward_std", "images")
REWARD = "reward_mean"


@dataclass(frozen=True)
class Change:
    """A held-out quantity at the first and the last evaluation.

    compared: by single pictures; None where the run has not kept what they got. guided: the same quantity of
    the base with guidance, and what the last evaluation differs from it by; None where it was not measured.
    """

    name: str
    before: float
    after: float
    compared: Comparison | None = None
    guided: Change | None = None

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def error(self) -> float | None:
        """Standard error of the difference, None where it is not known."""
        found = math.nan if self.compared is None else self.compared.error
        return None if math.isnan(found) else found

    @property
    def direction(self) -> str:
        """up or down where chance hardly does as much, same where it does, unknown."""
        if self.error is None or self.compared is None:
            return "unknown"
        return {-1: "down", 0: "same", 1: "up"}[self.compared.direction()]

    def fell(self, among: int = 1) -> bool:
        """Whether it fell by more than chance makes one of so many fall."""
        return self.compared is not None and self.compared.direction(among) < 0

    @property
    def digits(self) -> int:
        """Decimals of the values, enough to show the difference beside its error."""
        largest = max(abs(self.before), abs(self.after))
        return digits(self.error, least=3 if largest < 10 else 1)

    @property
    def plottable(self) -> bool:
        return 0 <= self.before <= 1 and 0 <= self.after <= 1


def ends(run: Run) -> tuple[dict, dict]:
    """The records of the first and the last evaluation that can be compared."""
    return run.evaluated[0], run.evaluated[-1]


def changes(run: Run) -> list[Change]:
    """Overall and clean, the reward where there is neither, then every category and what else rewards report:
    those that the first and the last evaluation both have."""
    if not run.evaluated:
        return []
    first, last = ends(run)
    names = [key.removeprefix("eval/") for key in last if key.startswith("eval/") and key in first]
    main = [name for name in ("overall", "clean") if name in names] or [REWARD]
    others = [name for name in names if name not in NOT_CATEGORIES and "/" not in name]
    return [change for name in main + others if (change := change_of(run, name)) is not None]


def change_of(run: Run, name: str) -> Change | None:
    """name: of a metric, without eval/. None where one of the two evaluations lacks it."""
    first, last = ends(run)
    before, after = number(first, f"eval/{name}"), number(last, f"eval/{name}")
    if not math.isfinite(before + after):
        return None
    both = compared(run, first["iteration"], last["iteration"], name)
    return Change(name, before, after, both, against_guided_base(run, name))


def against_guided_base(run: Run, name: str) -> Change | None:
    """From the base with guidance to the last evaluation; None where it was not measured."""
    first, last = ends(run)
    base, now = number(first, f"{GUIDED_BASE}{name}"), number(last, f"eval/{name}")
    if not math.isfinite(base + now):
        return None
    return Change(name, base, now, compare_metric(run.guided_base, run.scores.get(last["iteration"]), name))


def guidance_scale(run: Run) -> float:
    """The guidance scale of the guided base; NaN if that was not evaluated."""
    return number(run.evaluated[0], f"{GUIDED_BASE}guidance_scale") if run.evaluated else math.nan


def compared(run: Run, first: int, last: int, name: str) -> Comparison | None:
    """A metric at two iterations by single pictures; None where they cannot be paired."""
    if first == last:
        return None
    return compare_metric(run.scores.get(first), run.scores.get(last), name)


def best_before(run: Run, name: str) -> tuple[int, Comparison] | None:
    """The best evaluation's iteration and how the last differs from it.

    None where the last is no worse, or by no more than the best of so many is better than it by chance.
    """
    best = max(run.evaluated, key=lambda row: number(row, f"eval/{name}"))
    both = compared(run, best["iteration"], ends(run)[1]["iteration"], name)
    return (best["iteration"], both) if both is not None and both.p < LEVEL / len(run.evaluated) else None


def headline(run: Run, found: list[Change]) -> str:
    """The result in one plain sentence."""
    if not found:
        return _training_headline(run)
    main, (first, last), held_out = found[0], ends(run), not trained_on(run)
    name = "correctness" if main.name == "overall" else label(main.name).lower()
    what = f"Held-out {name}" if held_out else f"{name.capitalize()} on the evaluated prompts"
    if first is last:
        when = f"after iteration {first['iteration']}" if first["iteration"] else "before training"
        error = error_of(run.scores.get(first["iteration"]), main.name)
        shown = f"{main.after:.{digits(error)}f}"
        said = "." if math.isnan(error) else f", standard error {error:.{digits(error)}f}."
        return f"{what} {when} is {shown}{said}"
    places = digits(main.error)
    when = counted(last["iteration"] - first["iteration"])
    span = f"from {main.before:.{places}f} to {main.after:.{places}f} in {when}"
    if main.error is None:
        return f"{what} went {span} ({signed(main.difference, places)}, standard error not known)."
    size = f"({signed(main.difference, places)}, standard error {main.error:.{places}f})"
    if main.direction == "same":
        return f"{what} went {span} {size}, which this evaluation cannot tell from no change."
    return f"{what} {'rose' if main.direction == 'up' else 'fell'} {span} {size}."


def _training_headline(run: Run) -> str:
    rewards = [value for value in series(run.trained, REWARD) if math.isfinite(value)]
    if not rewards:
        return "No iteration of this run is finished yet."
    end = max(1, len(rewards) // 10)
    first, last = statistics.fmean(rewards[:end]), statistics.fmean(rewards[-end:])
    span = f"went from {first:.2f} to {last:.2f}" if len(rewards) > 1 else f"is {first:.2f}"
    return f"The training reward {span} after {counted(len(rewards))}; held-out prompts were not evaluated."


# --- prompts


def trained_on(run: Run) -> int:
    """How many of the evaluated prompts are among those for training, as far as it is known."""
    known = _trained(run)
    return known[0] if known else 0


def _trained(run: Run) -> tuple[int, int] | None:
    last = run.evaluated[-1]["iteration"] if run.evaluated else None
    return run.scores[last].trained_on() if last in run.scores else None


def prompts_note(run: Run) -> str:
    """How many pictures of how many prompts, and whether those are trained on."""
    images = number(run.evaluated[-1], "eval/images")
    scores = run.scores.get(run.evaluated[-1]["iteration"])
    said = f"{images:.0f} pictures" if math.isfinite(images) else "Pictures"
    if scores is not None:
        said = f"{len(scores)} pictures of {len(set(scores.prompts))} prompts"
    known = _trained(run)
    if known is None:
        return f"{said}."
    shared, count = known
    if not shared:
        return f"{said}, none of which is among the prompts for training."
    return f"{said}, of which {shared if shared < count else 'all'} are among the prompts for training."


def base_note(run: Run) -> str:
    """What the first evaluation is, and how its pictures are drawn."""
    scale = (run.config.get("evaluate") or {}).get("guidance_scale")
    if not isinstance(scale, (int, float)):
        return ""
    how = "without guidance" if scale == 1 else f"with guidance scale {scale:g}"
    other = "with" if scale == 1 else "without"
    base = f" The base with the same seeds but {other} guidance was not measured."
    if run.evaluated[0]["iteration"]:
        return f"All pictures are drawn {how}."
    base = _guided_base_note(run) or base
    started = "the LoRA that training began with" if run.starts_from_lora else "the base model"
    return f"Iteration 0 is {started}; all pictures are drawn {how}.{base}"


def _guided_base_note(run: Run) -> str:
    """The base with guidance beside the last evaluation; nothing where it was not measured."""
    first, last = ends(run)
    found = (against_guided_base(run, name) for name in ("overall", REWARD))
    change, scale = next((one for one in found if one), None), guidance_scale(run)
    if change is None or not math.isfinite(scale):
        return ""
    places = digits(change.error)
    what = "correctness" if change.name == "overall" else label(change.name).lower()
    said = f" The base with guidance scale {scale:g} and the same seeds has {what} {change.before:.{places}f}"
    if last is first:
        return f"{said}."
    size = signed(change.difference, places)
    if change.error is None:
        return f"{said}; iteration {last['iteration']} differs from it by {size}."
    sure = ", which cannot be told from no difference" if change.direction == "same" else ""
    return (
        f"{said}; iteration {last['iteration']} differs from it by {size} (standard error "
        f"{change.error:.{places}f}{sure})."
    )


# --- reward and judges


@dataclass(frozen=True)
class Judged:
    """The trained reward, or what judges it.

    rise: its difference in standard deviations of the first evaluation's pictures, behind: how far it is
    behind the reward's rise; None where they are not known. trained: whether the run trains on it.
    """

    change: Change
    label: str
    trained: bool
    rise: float | None = None
    behind: Comparison | None = None


def judged(run: Run) -> list[Judged]:
    """The reward and its parts, then what judges it: clean and `eval_rewards`; [] where nothing does."""
    if not run.evaluated:
        return []
    rewards = trained_weights(run.config.get("rewards"))
    names = [key.removeprefix("eval/") for key in run.evaluated[-1] if key.startswith("eval/")]
    judges = [name for name in names if name == "clean" or name.startswith("judge/")]
    parts = [name for name in names if name.startswith("reward/")]
    if not judges:
        return []
    found = []
    for name in [REWARD, *(parts if len(parts) > 1 else []), *judges]:
        change = change_of(run, name)
        if change is not None:
            own = name.partition("/")[2] or name
            trained = name not in judges or (own in rewards and name != "clean")
            title = "Reward" if name == REWARD else label(own)
            title += " (trained on as well)" if trained and name in judges else ""
            found.append(Judged(change, title, trained, *_behind(run, name)))
    return found if len(found) > 1 else []


def _behind(run: Run, name: str) -> tuple[float | None, Comparison | None]:
    first, last = (row["iteration"] for row in ends(run))
    both = compared(run, first, last, name)
    if both is None:
        return None, None
    scores = run.scores[first]
    measure, _ = measure_of(scores, name) or (name, None)
    size = deviation(scores, measure)
    rise = None if size is None else both.difference / size
    behind = None if name == REWARD else gap(scores, run.scores[last], "reward", measure)
    return rise, behind


def exploited(run: Run) -> list[Fall]:
    """The judges that fell while what the run trains on rose, where the alarm first finds any in this run."""
    rewards, train, evaluate = (run.config.get(name) or {} for name in ("rewards", "train", "evaluate"))
    iterations, every = train.get("iterations"), evaluate.get("every")
    evaluations = 1
    if isinstance(iterations, int) and isinstance(every, int) and iterations > 0:
        evaluations = planned_evaluations(iterations, every)
    records = [row for row in run.evaluations if f"eval/{REWARD}" in row]
    return first_falls(records, trained_weights(rewards), evaluations, run.scores.get)
