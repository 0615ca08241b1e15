"""What a run's rewards say about the run: metrics, and warnings when they cannot be trusted.

The warnings are a function of the metrics that are logged and of the evaluations' scores of single pictures,
so that a resumed run has the memory of one that never stopped. Each kind is given once: through `logging` and
as a line of `warnings.txt` in the run's folder.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from crd_fast.rewards.advantage import combine
from crd_fast.rewards.registry import means
from crd_fast.run.hacking import falls, said_of
from crd_fast.run.metrics import SCORED, TRAINED_ALIKE
from crd_fast.run.new_files import write_atomically
from crd_fast.run.scores import mean_and_error, scores_of, units_of

WARNINGS = "warnings.txt"
CONSTANT_IMAGES = 32  # so many images in a row with one value make a reward look broken
WINDOW = 10  # iterations looked back on
MIN_GROUPS, EQUAL_SHARE = 20, 0.5  # groups among them, share that is too often
FALL = 6  # standard errors between two windows; chance alone does that in one of 300 runs of 400 iterations

logger = logging.getLogger("crd_fast")


def reward_metrics(scores_PK: dict[str, np.ndarray], weights: dict[str, float]) -> dict[str, float]:
    """Metrics of one iteration's rewards, each (P, K), of what was scored: NaN is left out.

    `reward_mean` and `reward_std`: of the sum by weight, before any normalisation. `reward/NAME` and
    `reward_std/NAME`: of each. `reward_best/NAME`: the largest, the smallest where the weight is negative.
    `groups_equal`: the share of prompts whose samples all have one reward, or none, which teach nothing.
    `scored/NAME`: the share of samples that a reward scored, where that is not all.
    """
    total_PK = combine(scores_PK, weights, "sum")
    known_PK = ~np.isnan(total_PK)
    highest_P = total_PK.max(axis=1, where=known_PK, initial=-math.inf)
    lowest_P = total_PK.min(axis=1, where=known_PK, initial=math.inf)
    metrics = {
        "reward_mean": float(np.nanmean(total_PK)),
        "reward_std": float(np.nanstd(total_PK)),
        "groups_equal": float(np.mean(highest_P <= lowest_P)),
    }
    metrics |= means(scores_PK, "reward")
    for name, score_PK in scores_PK.items():
        found = score_PK[~np.isnan(score_PK)]
        if len(found):
            metrics[f"reward_std/{name}"] = float(found.std()) if np.ptp(found) else 0.0
            metrics[f"reward_best/{name}"] = float(found.min() if weights[name] < 0 else found.max())
    return metrics


def judge_metrics(
    reward_N: np.ndarray, judged_N: dict[str, np.ndarray], prompts_N: Sequence[str]
) -> dict[str, float]:
    """Metrics of an evaluation by judges: each one's mean, and standard errors to hold changes to.

    Pictures of one prompt are not independent: prompts are the units of the errors, 0 where there is one.
    """
    metrics = {f"eval/{name}": value for name, value in means(judged_N, "judge").items()}
    measured = {"reward": reward_N} | {f"judge/{name}": values for name, values in judged_N.items()}
    for name, values in measured.items():
        known = ~np.isnan(values)
        if not (count := int(known.sum())):
            continue
        error = mean_and_error(values[known], units_of(prompts_N)[known], np.full(count, 1 / count))[1]
        metrics[f"standard_error/{name}"] = 0.0 if math.isnan(error) else error
    return metrics


class Watch:
    """Looks at each record of metrics.jsonl in turn.

    prompts: of an iteration; samples: of a prompt; rewards: names of those that are trained on, which are no
    judges; records: of a run that is resumed, looked at quietly; evaluations: how many the run is to have
    after its first.
    """

    def __init__(
        self,
        run: Path,
        prompts: int,
        samples: int,
        rewards: Collection[str] = (),
        records: Sequence[dict] = (),
        evaluations: int = 1,
    ):
        self.path = run / WARNINGS
        self.prompts, self.samples, self.rewards = prompts, samples, rewards
        self.evaluations = evaluations
        self.given: dict[str, str] = {}
        self._equal: deque[float] = deque(maxlen=WINDOW)
        self._rewards: list[float] = []  # of the present window
        self._best: tuple[float, float, int] | None = None  # mean, its variance and end of the best window
        self._first: list[float] = []  # those of the first window, and of the last, which moves on one by one
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._alike_since = 0  # the iteration from which on the prompts were the present ones
        self._constant: dict[str, int] = defaultdict(int)
        self._silent: dict[str, int] = {}  # iterations in a row without a score
        self._bests: dict[str, set[float]] = defaultdict(set)  # of iterations whose pictures differed
        self._evaluations: list[dict] = []
        self._scores = functools.lru_cache(4)(functools.partial(scores_of, run))
        for record in records:
            self._look(record)
        if self.given or self.path.exists():
            self._write()

    def see(self, record: dict) -> list[str]:
        """The warnings that this record gives rise to, printed and written down."""
        new = self._look(record)
        for warning in new:
            logger.warning("warning: %s", warning)
        if new:
            self._write()
        return new

    def _look(self, record: dict) -> list[str]:
        found: dict[str, str] = {}
        if "groups_equal" in record:
            found |= self._constant_rewards(record) | self._silent_rewards(record)
            found |= self._trained_pictures(record)
            found |= self._equal_groups(record)
        if "eval/reward_mean" in record:
            found |= self._silent_judges(record) | self._hacking(record)
        new = {kind: text for kind, text in found.items() if kind not in self.given}
        self.given |= new
        return list(new.values())

    def _write(self) -> None:
        write_atomically(self.path, "".join(f"{text}\n" for text in self.given.values()))

    def _constant_rewards(self, record: dict) -> dict[str, str]:
        """A reward that gives all pictures one value, unless that is the best it gave when they differed.

        Then all of them are simply right, as they are late in a good run.
        """
        found = {}
        for key in (key for key in record if key.startswith("reward_std/")):
            name = key.removeprefix("reward_std/")
            images = round(self.prompts * self.samples * record.get(f"scored/{name}", 1))
            self._constant[name] = 0 if record[key] else self._constant[name] + images
            best = record[f"reward_best/{name}"]
            if record[key]:
                self._bests[name].add(best)
            elif self._constant[name] >= CONSTANT_IMAGES and best not in self._bests[name]:
                found[f"constant {name}"] = (
                    f"iteration {record['iteration']}: reward {name} was {record[f'reward/{name}']:g} for "
                    f"each of the last {self._constant[name]} images: it may be broken"
                )
        return found

    def _silent_rewards(self, record: dict) -> dict[str, str]:
        """A reward that has scored nothing for long, while others have: the run goes on without it."""
        scored = {key.removeprefix("scored/"): of for key, of in record.items() if key.startswith("scored/")}
        self._silent = {name: self._silent.get(name, 0) + 1 for name, share in scored.items() if not share}
        return {
            f"silent {name}": f"iteration {record['iteration']}: reward {name} scored none of the pictures "
            f"of the last {iterations} iterations: they are trained on without it"
            for name, iterations in self._silent.items()
            if iterations >= WINDOW
        }

    def _silent_judges(self, record: dict) -> dict[str, str]:
        """What scored no picture of an evaluation, whose prompts or number of samples are not for it."""
        silent = [key for key, share in record.items() if key.startswith(SCORED) and not share]
        return {
            key: f"iteration {record['iteration']}: {key.removeprefix(SCORED)} scored none of the pictures "
            "of the evaluation, which says nothing of it"
            for key in silent
        }

    def _equal_groups(self, record: dict) -> dict[str, str]:
        self._equal.append(record["groups_equal"])
        groups, share = len(self._equal) * self.prompts, sum(self._equal) / len(self._equal)
        if groups < MIN_GROUPS or share <= EQUAL_SHARE:
            return {}
        why = "prompts too hard or easy, or a reward too coarse"
        if self._has_risen():
            why = "most pictures are right by now, and harder prompts would teach more"
        return {
            "equal groups": f"iteration {record['iteration']}: {share:.0%} of the last {groups} groups had "
            f"one reward for all samples and teach nothing: {why}"
        }

    def _has_risen(self) -> bool:
        """Whether the mean reward of the last window is above that of the first by three standard errors."""
        if len(self._first) < WINDOW:
            return False
        error = math.sqrt((np.var(self._first, ddof=1) + np.var(self._last, ddof=1)) / WINDOW)
        return bool(np.mean(self._last) - np.mean(self._first) > 3 * error)

    def _trained_pictures(self, record: dict) -> dict[str, str]:
        """Windows stand side by side, so that each is compared with the best one before it and no more.

        Where a run has gone on with other prompts they begin anew.
        """
        if record.get(TRAINED_ALIKE, 0) != self._alike_since:
            self._rewards, self._best, self._alike_since = [], None, record.get(TRAINED_ALIKE, 0)
            self._first = []
        self._rewards.append(record["reward_mean"])
        self._last.append(record["reward_mean"])
        if len(self._first) < WINDOW:
            self._first.append(record["reward_mean"])
        if len(self._rewards) < WINDOW:
            return {}
        mean, variance = float(np.mean(self._rewards)), float(np.var(self._rewards, ddof=1)) / WINDOW
        self._rewards, best, end = [], self._best, record["iteration"]
        if best is None or mean > best[0]:
            self._best = mean, variance, end
        if best is None or best[0] - mean <= FALL * math.sqrt(variance + best[1]):
            return {}
        return {
            "trained pictures": f"iteration {end}: the pictures that are trained on had a mean reward of "
            f"{mean:.3g} in the last {WINDOW} iterations, of {best[0]:.3g} in those up to {best[2]}. If "
            "held-out pictures do not fall, the rollout no longer makes what the model can: more "
            "rollout.steps, or rollout.solver euler. If they do, a larger loss.kl_beta or a smaller "
            "train.learning_rate"
        }

    def _hacking(self, record: dict) -> dict[str, str]:
        fallen = falls(self._evaluations, record, self.rewards, self.evaluations, self._scores)
        self._evaluations.append(record)
        return {"hacking": said_of(fallen)} if fallen else {}
