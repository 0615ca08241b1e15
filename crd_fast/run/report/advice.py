"""What to try next where a metric is not what docs/metrics.md calls healthy; nothing where all are.

Each rule looks at one metric over the whole run, in fifths of its iterations, so that the noise of single
iterations decides nothing. docs/troubleshooting.md says the same with its reasons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from crd_fast.reward_weights import trained_weights
from crd_fast.run.metrics import TRAINED_ALIKE, comparable
from crd_fast.run.report.held_out import Change, best_before, exploited
from crd_fast.run.report.run import Run, number, series
from crd_fast.run.report.words import counted, digits
from crd_fast.run.scores import LEVEL, p_value

LEAST = 20  # iterations from which on a trend is one
EQUAL = 0.5  # of the groups
STILL = 0.01  # of the external variance: the policy does not move
OUT_OF_STEP = 10.0  # times the external variance
DRIFT = 1.5  # times the distance in the middle of the run
BEHIND = 100.0  # times the deviation at the run's beginning
JUMP = 10.0  # times the median gradient norm
SLOW_REWARD = 0.15  # of an iteration


@dataclass(frozen=True)
class Advice:
    """metric: its name in metrics.jsonl; value: what it is; said: why that is off; tries: what may help."""

    metric: str
    value: str
    said: str
    tries: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """What the rules look at. main: the first row of the held-out table."""

    run: Run
    rows: Sequence[dict]
    main: Change | None

    def fifths(self, key: str) -> list[list[float]]:
        """The metric's finite values in five parts of the run; [] where it is in too few iterations."""
        values = [value for value in series(self.rows, key) if math.isfinite(value)]
        if len(values) < LEAST:
            return []
        count = len(values)
        return [values[i * count // 5 : (i + 1) * count // 5] for i in range(5)]

    def means(self, key: str) -> list[float]:
        return [statistics.fmean(part) for part in self.fifths(key)]

    def setting(self, name: str) -> str:
        """`train.learning_rate=0.001`, as the recipe has it; the name alone where it does not say."""
        section, key = name.split(".")
        value = (self.run.config.get(section) or {}).get(key)
        return name if value is None else f"{name} (now {value})"

    def reward_change(self) -> tuple[float, float, bool] | None:
        """Mean reward of the first and the last fifth, and whether it rose by more than chance makes it."""
        parts = self.fifths("reward_mean")
        if not parts:
            return None
        before, after = statistics.fmean(parts[0]), statistics.fmean(parts[-1])
        return before, after, after > before and _by_chance(parts[0], parts[-1]) < LEVEL


def advice(run: Run, found: Sequence[Change]) -> list[Advice]:
    """What is off and what to try, the most general first."""
    seen = Seen(run, comparable(run.trained, TRAINED_ALIKE), found[0] if found else None)
    given = [rule(seen) for rule in RULES]
    return [one for one in given if one is not None]


def reward_does_not_rise(seen: Seen) -> Advice | None:
    change = seen.reward_change()
    if change is None or change[2]:
        return None
    before, after, _ = change
    tries = []
    if _flat(seen):
        tries.append("score pictures with the reward alone: crd-fast score --reward NAME")
    if statistics.fmean(series(seen.rows, "groups_equal")[-LEAST:]) > EQUAL:
        tries.append("easier or harder prompts, or a reward with partial credit: most groups got one value")
    if _still(seen):
        tries.append(f"a larger {seen.setting('train.learning_rate')}")
        tries.append(f"a smaller {seen.setting('loss.beta')}")
    if not tries:
        tries.append(f"more {seen.setting('rollout.prompts_per_iteration')}, for less noise")
        tries.append(f"more {seen.setting('train.iterations')}")
        tries.append(f"a larger {seen.setting('train.learning_rate')}")
    return Advice(
        "reward_mean",
        f"{before:.3f} to {after:.3f}",
        f"the training reward has not risen in {counted(len(seen.rows))}",
        tuple(tries),
    )


def constant_reward(seen: Seen) -> Advice | None:
    if not _flat(seen):
        return None
    return Advice(
        "reward_std",
        "0",
        "all pictures of an iteration got one reward in most iterations: nothing to learn from",
        ("score pictures with the reward alone: crd-fast score --reward NAME",),
    )


def equal_groups(seen: Seen) -> Advice | None:
    """Early: at the end of a good run most pictures are right, and most groups equal."""
    shares = seen.means("groups_equal")
    if not shares or shares[0] <= EQUAL or _flat(seen):
        return None
    return Advice(
        "groups_equal",
        f"{shares[0]:.2f} in the first fifth of the run",
        "more than half of the groups got one reward for all samples from the start, and teach nothing",
        (
            "easier prompts where the rewards are low, harder ones where they are high",
            "a reward with partial credit, such as ocr_dense beside ocr",
            f"more {seen.setting('rollout.samples_per_prompt')}",
        ),
    )


def policy_does_not_move(seen: Seen) -> Advice | None:
    change = seen.reward_change()
    if not _still(seen) or (change is not None and not change[2]):  # said with the reward
        return None
    ratio = _variance_ratio(seen)
    return Advice(
        "implicit_variance",
        f"{ratio:.2g} of external_variance",
        "the policy hardly moves",
        (f"a larger {seen.setting('train.learning_rate')}", f"a smaller {seen.setting('loss.beta')}"),
    )


def out_of_step(seen: Seen) -> Advice | None:
    ratio = _variance_ratio(seen)
    if not ratio > OUT_OF_STEP:
        return None
    return Advice(
        "implicit_variance",
        f"{ratio:.0f} times external_variance",
        "the policy’s log-ratio is far larger than the rewards that it is to match",
        (f"a smaller {seen.setting('train.learning_rate')}", f"a smaller {seen.setting('loss.beta')}"),
    )


def old_is_slow(seen: Seen) -> Advice | None:
    means = seen.means("old_deviation")
    if not means or not means[-1] > BEHIND * max(means[0], 1e-12) or not means[0]:
        return None
    return Advice(
        "old_deviation",
        f"{means[0]:.2g} to {means[-1]:.2g}",
        "the policy runs away from `old`, which follows it too slowly",
        (f"a faster {seen.setting('snapshots.old')}", f"a smaller {seen.setting('train.learning_rate')}"),
    )


def pictures_drift(seen: Seen) -> Advice | None:
    means = seen.means("kl")
    if not means or not (means[2] < means[3] < means[4] and means[4] > DRIFT * max(means[2], means[0])):
        return None
    return Advice(
        "kl",
        f"{means[2]:.3g} in the middle of the run, {means[4]:.3g} at its end",
        "the policy moves away from the guided pretrained model, and does not stop",
        (f"a larger {seen.setting('loss.kl_beta')}", f"a smaller {seen.setting('train.learning_rate')}"),
    )


def clipped(seen: Seen) -> Advice | None:
    limit = (seen.run.config.get("train") or {}).get("max_grad_norm")
    norms = [value for value in series(seen.rows, "grad_norm") if math.isfinite(value)]
    if not isinstance(limit, (int, float)) or len(norms) < LEAST:
        return None
    count = sum(norm > limit for norm in norms)
    if count <= len(norms) / 2:
        return None
    return Advice(
        "grad_norm",
        f"{statistics.median(norms):.3g} (median)",
        f"gradients were clipped to {limit:g} in {count} of {counted(len(norms))}",
        (
            f"a smaller {seen.setting('train.learning_rate')}, by half",
            f"a larger {seen.setting('train.max_grad_norm')} where the reward rises all the same",
        ),
    )


def gradient_jumps(seen: Seen) -> Advice | None:
    norms = [value for value in series(seen.rows, "grad_norm") if math.isfinite(value)]
    if len(norms) < LEAST or not max(norms[len(norms) // 5 :]) > JUMP * statistics.median(norms) > 0:
        return None
    return Advice(
        "grad_norm",
        f"{max(norms):.3g}, median {statistics.median(norms):.3g}",
        "single gradients are far larger than the rest",
        (f"a smaller {seen.setting('train.learning_rate')}, by half",),
    )


def reward_is_exploited(seen: Seen) -> Advice | None:
    fallen = exploited(seen.run)
    if not fallen:
        return None
    fall = fallen[0]
    return Advice(
        f"eval/{fall.judge}",
        f"{fall.values} from iteration {fall.before['iteration']} to {fall.after['iteration']}",
        "a judge falls while the reward rises: the reward is being exploited",
        (
            f"a larger {seen.setting('loss.kl_beta')}",
            "an earlier checkpoint, by its folder in RUN/checkpoints: the best is so by this reward",
            "the judge as a second reward",
        ),
    )


def a_part_falls(seen: Seen) -> Advice | None:
    """One of several rewards, while their sum rises."""
    change = seen.reward_change()
    names = [key for key in (seen.rows[-1] if seen.rows else {}) if key.startswith("reward/")]
    if change is None or not change[2] or len(names) < 2:
        return None
    weights = trained_weights(seen.run.config.get("rewards"))
    for name in names:
        parts, weight = seen.fifths(name), weights.get(name.removeprefix("reward/"))
        if not parts or weight is None:
            continue
        before, after = statistics.fmean(parts[0]), statistics.fmean(parts[-1])
        if (after - before) * weight < 0 and _by_chance(parts[0], parts[-1]) < LEVEL / len(names):
            return Advice(
                name,
                f"{before:.3f} to {after:.3f}",
                f"{'falls' if weight > 0 else 'unwanted, rises'} while the sum of the rewards rises",
                (
                    f"a {'larger' if weight > 0 else 'more negative'} weight for it",
                    "advantage.aggregate: gdpo, which normalises each reward alone",
                ),
            )
    return None


def better_before(seen: Seen) -> Advice | None:
    found = best_before(seen.run, seen.main.name) if seen.main and len(seen.run.evaluated) > 1 else None
    if found is None or seen.main is None:
        return None
    iteration, both = found
    places = digits(both.error)
    return Advice(
        f"eval/{seen.main.name}",
        f"{both.before:.{places}f} at iteration {iteration}, {both.after:.{places}f} at the last",
        "the run has become worse on what it is evaluated by",
        (
            "its best checkpoint: crd-fast eval RUN",
            f"a smaller {seen.setting('train.learning_rate')}, or fewer {seen.setting('train.iterations')}",
            "more prompts for training",
        ),
    )


def below_the_guided_base(seen: Seen) -> Advice | None:
    """Once the run is done: until then it may well be on its way."""
    run, change = seen.run, seen.main.guided if seen.main else None
    done = run.metrics[-1]["iteration"] if run.metrics else 0
    if change is None or change.direction != "down" or not run.planned or done < run.planned:
        return None
    return Advice(
        f"eval/{change.name}",
        f"{change.after:.{change.digits}f}, {change.before:.{change.digits}f} with the guided base",
        "the trained model has not reached what the base does with guidance",
        (
            f"more {seen.setting('train.iterations')}",
            f"a larger {seen.setting('loss.kl_beta')}: the anchor is what teaches guidance",
        ),
    )


def slow_reward(seen: Seen) -> Advice | None:
    totals = {
        name: sum(value for value in series(seen.rows, f"seconds_{name}") if math.isfinite(value))
        for name in ("rollout", "reward", "update")
    }
    whole = sum(totals.values())
    if len(seen.rows) < LEAST or not whole or totals["reward"] <= SLOW_REWARD * whole:
        return None
    return Advice(
        "seconds_reward",
        f"{totals['reward'] / whole:.0%} of an iteration",
        "pictures wait for their rewards",
        (
            "workers: auto in the reward’s settings, which scores in processes of their own",
            "crd-fast serve-reward on another machine",
        ),
    )


def left_out(seen: Seen) -> Advice | None:
    steps = sum(value for value in series(seen.rows, "steps_left_out") if math.isfinite(value))
    if not steps:
        return None
    return Advice(
        "steps_left_out",
        f"{steps:.0f}",
        "optimizer steps whose loss or gradient was not finite were left out",
        (f"a smaller {seen.setting('train.learning_rate')}", f"another {seen.setting('train.precision')}"),
    )


RULES = (
    reward_does_not_rise,
    constant_reward,
    equal_groups,
    reward_is_exploited,
    a_part_falls,
    better_before,
    below_the_guided_base,
    policy_does_not_move,
    out_of_step,
    old_is_slow,
    pictures_drift,
    clipped,
    gradient_jumps,
    left_out,
    slow_reward,
)


def _flat(seen: Seen) -> bool:
    """Whether most iterations gave one reward to all pictures."""
    values = [value for value in series(seen.rows, "reward_std") if math.isfinite(value)]
    return len(values) >= LEAST and sum(value < 1e-6 for value in values) > len(values) / 2


def _variance_ratio(seen: Seen) -> float:
    """Median of the implicit over the external variance in the run's second half; NaN where not known."""
    if len(seen.rows) < LEAST:
        return math.nan
    ratios = [
        number(row, "implicit_variance") / number(row, "external_variance")
        for row in seen.rows[len(seen.rows) // 2 :]
        if number(row, "external_variance") > 0
    ]
    ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    return statistics.median(ratios) if ratios else math.nan


def _still(seen: Seen) -> bool:
    return _variance_ratio(seen) < STILL


def _by_chance(first: Sequence[float], last: Sequence[float]) -> float:
    """How often chance makes the means of two parts of a run differ so much, two-sided."""
    error = math.hypot(*(statistics.stdev(part) / math.sqrt(len(part)) for part in (first, last)))
    return p_value(statistics.fmean(last) - statistics.fmean(first), error, len(first) + len(last) - 1)
