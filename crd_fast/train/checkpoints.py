"""A run's checkpoints: the one it goes on from, when another is due, which is the best."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from crd_fast.config import Recipe, build_recipe
from crd_fast.errors import UserError
from crd_fast.prompts.lists import evaluated_lists
from crd_fast.ranks import Ranks
from crd_fast.run.lock import RunLock
from crd_fast.run.metrics import EVALUATED_ALIKE, TRAINED_ALIKE, read_metrics
from crd_fast.train.changes import OF_REWARDS, check_changes, check_served
from crd_fast.train.places import check_base
from crd_fast.train.seen_prompts import SeenPrompts
from crd_fast.weights import checkpoint

SCORE = "eval/reward_mean"  # by which one is the best
BESIDE = {"every", "guided_base"}  # settings of evaluations that change no score
ADDED = {"drift", "features"}  # nor these; but what one of them measured is no measure for another
MEASURED = "measured"  # in a checkpoint's state: what judges were like when they last were there

logger = logging.getLogger("crd_fast")


class Checkpoints:
    """In the folder `checkpoints` of a run. All ranks have one; the main one alone touches the files.

    newest: what a resumed run goes on from, and `state` its JSON; None for a new run and for one that ended
    before its first checkpoint. saved: the iteration of the last one, -1 before the first.
    Raises UserError where a run is resumed whose checkpoints are gone or damaged, which another process is
    writing to, or with a recipe that is another one's.
    """

    def __init__(self, output: Path, recipe: Recipe, ranks: Ranks, resume: bool):
        self.output, self.recipe, self.ranks = output, recipe, ranks
        self.folder = output / "checkpoints"
        self._lock: RunLock | None = None
        found = self._find() if resume and ranks.main else None
        self.newest: Path | None = ranks.all(found)[0]
        self.state = checkpoint.read_state(self.newest) if self.newest else None
        if self.newest and self.state:
            check_changes(self.state["recipe"], recipe, self.newest, say=ranks.main)
            check_base(recipe, self.newest)
            if recipe.model.sharding != "none":
                from crd_fast.weights import sharded

                sharded.check_resumes(self.state, ranks.count, self.newest)
        self._served: dict[str, str] = {}
        self._seen = SeenPrompts.of(recipe)
        self.saved: int = self.state["iteration"] if self.state else -1
        self._saved_at = time.monotonic()
        self._measured = measured(recipe)
        self._alike_since = self._found_alike_since()
        self._best = max(self._scored(), default=None)
        self._marked = self._found_marked() if self.newest and ranks.main else None

    def check_served(self, served: dict[str, str]) -> None:
        """served: as of `Rewards`. Raises UserError where a server has another reward than before."""
        self._served = served
        if self.newest and self.state:
            self._served = check_served(self.state, self.recipe.rewards, served, self.newest)

    def _found_alike_since(self) -> dict[str, int]:
        """The iterations from which on training prompts, and evaluations, are as the recipe has them."""
        if not self.state:
            return {TRAINED_ALIKE: 0, EVALUATED_ALIKE: 0}
        before = build_recipe(self.state["recipe"], source=str(self.newest))
        seen = SeenPrompts(**self.state["prompts"]) if "prompts" in self.state else self._seen
        for line in self._seen.changes(seen) if self.ranks.main else ():
            logger.warning("warning: %s", line)
        known = self.state.get(MEASURED, {}) | measured(before)
        alike = {
            TRAINED_ALIKE: lists_of(before) == lists_of(self.recipe) and self._seen.trains_like(seen),
            EVALUATED_ALIKE: evaluated_alike(before, self.recipe, known) and self._seen.evaluates_like(seen),
        }
        if alike[EVALUATED_ALIKE]:
            self._measured = known | self._measured
        if self.ranks.main and not alike[EVALUATED_ALIKE]:
            logger.warning("evaluations are not as before: the best checkpoint is found anew")
        return {key: self.state.get(key, 0) if same else self.saved + 1 for key, same in alike.items()}

    def _found_marked(self) -> int | None:
        """The iteration that is marked as the best: that by the scores, which the process before may not have
        come to mark, or where none counts any more what was marked before."""
        marked = checkpoint.marked_best(self.folder)
        if self._best is None or marked == -self._best[1]:
            return marked
        checkpoint.mark_best(self._path(-self._best[1]))
        return -self._best[1]

    @property
    def trained_since(self) -> dict[str, int]:
        """For the record of an iteration: what `comparable` looks at, nothing where it was always so."""
        since = self._alike_since[TRAINED_ALIKE]
        return {TRAINED_ALIKE: since} if since else {}

    @property
    def evaluated_since(self) -> dict[str, int]:
        """The same for that of an evaluation."""
        since = self._alike_since[EVALUATED_ALIKE]
        return {EVALUATED_ALIKE: since} if since else {}

    def _find(self) -> Path | None:
        self.hold()
        newest = checkpoint.newest(self.folder, put_aside=True)
        records = read_metrics(self.output) if newest is None else []
        last = records[-1]["iteration"] if records else 0
        evaluated = any(SCORE in record for record in records if record["iteration"])
        if last >= self.recipe.checkpoint.every or evaluated:  # each was saved before it was logged
            raise UserError(
                f"{self.output}: its checkpoints are gone, though it came to iteration {last}: put them back "
                f"in {self.folder}, or train anew in another folder"
            )
        return newest

    def hold(self) -> None:
        """From now on no other process may write to the run."""
        if self._lock is None:
            self._lock = RunLock(self.output)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def long_ago(self) -> bool:
        """Whether the last one, or the start, was longer ago than the recipe wants.

        All ranks hear the same.
        """
        seconds = time.monotonic() - self._saved_at
        return self.ranks.any(seconds >= 60 * self.recipe.checkpoint.minutes)

    def is_unlogged(self, evaluates: bool) -> bool:
        """Whether the last iteration is not in the metrics, or without an evaluation that is due.

        A run may end after it has saved and before it has logged. All ranks hear the same.
        """
        records = read_metrics(self.output) if self.newest and self.ranks.main else []
        record = next((record for record in records if record["iteration"] == self.saved), {})
        logged = SCORE in record if evaluates else bool(record) or self.saved <= 0
        return self.ranks.all(not logged)[0]

    def save(self, weights, optimizer, state: dict) -> None:
        """weights, optimizer: as `Weights.gathered` returns them. state: what else is kept."""
        if self.ranks.main and weights is not None and optimizer is not None:
            checkpoint.save(
                self._path(state["iteration"]),
                weights,
                optimizer,
                state
                | {"recipe": self.recipe.model_dump(), "prompts": self._seen.state, "served": self._served}
                | {MEASURED: self._measured}
                | self._alike_since,
                self.recipe.checkpoint.keep,
                best=self._marked,
                used=self.recipe.evaluate.weights,
            )
        self.ranks.wait()
        self.saved, self._saved_at = state["iteration"], time.monotonic()

    def evaluated(self, record: dict) -> None:
        """Remembers the iteration if it is the best of those with a checkpoint, by the held-out score."""
        found = record[SCORE], -record["iteration"]
        if self.saved == record["iteration"] and (self._best is None or found > self._best):
            self._best, self._marked = found, record["iteration"]
            checkpoint.mark_best(self._path(record["iteration"]))

    def _scored(self) -> list[tuple[float, int]]:
        """Score and, so that of equal ones the first is the largest, the negative iteration."""
        records = read_metrics(self.output) if self.newest and self.ranks.main else []
        scored = [
            (record[SCORE], record["iteration"])
            for record in records
            if SCORE in record
            and record["iteration"] <= self.saved
            and record.get(EVALUATED_ALIKE, 0) == self._alike_since[EVALUATED_ALIKE]
        ]
        return [(score, -iteration) for score, iteration in scored if self._path(iteration).is_dir()]

    def _path(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:06d}"


def evaluated_alike(one: Recipe, other: Recipe, known: dict[str, Any] | None = None) -> bool:
    """Whether evaluations by the two can be compared: of the same pictures, by judges with the same settings.

    One may have judges that the other has not, or measure drift, or compare features. known: what these were
    like when they last were there, as of `measured`; by default as `one` has them.
    """
    known, now = measured(one) if known is None else known, measured(other)
    return _pictures(one) == _pictures(other) and all(known[key] == now[key] for key in known.keys() & now)


def measured(recipe: Recipe) -> dict[str, Any]:
    """What evaluations measure beside the reward, each with its settings."""
    judges = {f"eval_rewards.{name}": _settings(judge) for name, judge in recipe.eval_rewards.items()}
    added = {key: getattr(recipe.evaluate, key) for key in sorted(ADDED)}
    return judges | {key: value for key, value in added.items() if value is not None}


def lists_of(recipe: Recipe) -> list[tuple[str, float]]:
    """The names of the lists that are trained on, with their weights, in their order. A file may have moved,
    and two in different folders may have one name."""
    return [(Path(name).name, weight) for name, weight in recipe.rollout.prompt_lists.items()]


def _pictures(recipe: Recipe) -> dict[str, Any]:
    """What says which pictures an evaluation scores. A file of prompts may have moved."""
    own = {
        "prompts": {Path(name).name for name in evaluated_lists(recipe)},
        "resolution": recipe.evaluation_size,
    }
    return recipe.evaluate.model_dump(exclude=BESIDE | ADDED) | own


def _settings(judge: Any) -> dict[str, Any]:
    """Without where it is and how it is asked."""
    settings = judge if isinstance(judge, dict) else {}
    return {key: value for key, value in settings.items() if key not in ("weight", *OF_REWARDS)}
