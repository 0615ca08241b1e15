"""Whether a run's rewards are exploited: what it trains on rises, what judges it from outside falls.

One rule, for the alarm while a run goes on and for its report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from crd_fast.run.metrics import EVALUATED_ALIKE, comparable
from crd_fast.run.scores import LEVEL, Scores, compare_metric

TRAINED = {"overall": "overall correctness", "reward_mean": "the trained reward"}  # what is to rise

ScoresAt = Callable[[int], Scores | None]  # of the evaluation at an iteration, where the run has kept them


@dataclass(frozen=True)
class Fall:
    """A judge that fell from one evaluation to a later one, and what the run trains on that rose meanwhile.

    judge, trained: metrics without `eval/`. before, after: the evaluations' records of metrics.jsonl.
    """

    judge: str
    trained: str
    before: dict
    after: dict

    @property
    def values(self) -> str:
        return f"{self.before[f'eval/{self.judge}']:.3f} to {self.after[f'eval/{self.judge}']:.3f}"


def planned_evaluations(iterations: int, every: int) -> int:
    """How many a run is to have after its first; every 0: one, at its end."""
    return math.ceil(iterations / (every or iterations))


def falls(
    past: Sequence[dict], record: dict, rewards: Collection[str], evaluations: int, scores: ScoresAt
) -> list[Fall]:
    """Judges that fell since the first evaluation, or since their best one, while the reward rose.

    past: the records of the evaluations before this one, of which those count that were made as it was.
    rewards: names of what is trained on, which is no judge. evaluations: how many the run is to have after
    its first.

    By more than chance makes one of them fall in one run of twenty, which takes Bonferroni's correction
    for all that is compared in it: each judge, in each evaluation, with the first and with each before it
    of which one is the best.
    """
    past = comparable([*past, record], EVALUATED_ALIKE)[:-1]
    names = [key.removeprefix("eval/") for key in record if key.startswith("eval/")]
    judges = [name for name in names if name == "clean" or name.startswith("judge/")]
    judges = [name for name in judges if name.removeprefix("judge/") not in rewards]
    found = [_fall(past, record, judge, 2 * len(judges), evaluations, scores) for judge in judges]
    return [fall for fall in found if fall is not None]


def first_falls(
    records: Sequence[dict], rewards: Collection[str], evaluations: int, scores: ScoresAt
) -> list[Fall]:
    """The falls of the first evaluation that has any. records: all evaluations, in their order."""
    for i, record in enumerate(records):
        if found := falls(records[:i], record, rewards, evaluations, scores):
            return found
    return []


def said_of(found: Sequence[Fall]) -> str:
    """The alarm, of the judges that fell in one evaluation."""
    after = found[0].after
    risen = [f"{TRAINED[fall.trained]} rises to {after[f'eval/{fall.trained}']:.3f}" for fall in found]
    fallen = [
        f"{fall.judge.removeprefix('judge/')} {fall.values} since iteration {fall.before['iteration']}"
        for fall in found
    ]
    return (
        f"iteration {after['iteration']}: {' and '.join(dict.fromkeys(risen))} while held-out judges fall "
        f"({'; '.join(fallen)}): this may be reward hacking"
    )


def _fall(
    past: Sequence[dict], record: dict, judge: str, compared: int, evaluations: int, scores: ScoresAt
) -> Fall | None:
    known = [before for before in past if f"eval/{judge}" in before]
    if not known:
        return None
    best = max(known, key=lambda before: before[f"eval/{judge}"])
    compared *= max(evaluations, len(known))
    for before, among in ((best, compared * len(known)), (known[0], compared)):
        trained = next((name for name in TRAINED if _change(before, record, name, scores) > 0), None)
        if trained and _change(before, record, judge, scores, among) < 0:
            return Fall(judge, trained, before, record)
    return None


def _change(before: dict, after: dict, name: str, scores: ScoresAt, among: int = 1) -> int:
    """-1, 0 or 1: whether a metric of two evaluations fell, held or rose, by chance one of so many.

    Picture by picture where the run has kept what each got, by the two means' errors where it has not.
    """
    paired = compare_metric(scores(before["iteration"]), scores(after["iteration"]), name)
    if paired is not None:
        return paired.direction(among)
    error = f"standard_error/{'reward' if name == 'reward_mean' else name}"
    if error not in before or error not in after:
        return 0
    difference = after[f"eval/{name}"] - before[f"eval/{name}"]
    size = math.hypot(before[error], after[error])
    if not size or math.erfc(abs(difference) / (size * math.sqrt(2))) >= LEVEL / among:
        return 0
    return 1 if difference > 0 else -1
