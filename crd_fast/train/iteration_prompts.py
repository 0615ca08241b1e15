"""Which prompts an iteration has, in which optimizer step, and on which rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from crd_fast.config import Recipe
from crd_fast.models import negative
from crd_fast.prompts.lists import notes, training_prompts
from crd_fast.ranks import Ranks, own_prompts
from crd_fast.rewards.registry import unscored
from crd_fast.run.observer import Observer

logger = logging.getLogger("crd_fast")

ENCODED_AHEAD = 480  # prompts that are encoded at a time, on each rank


class IterationPrompts:
    """The recipe's prompts for training. What is drawn is a function of the seed and the iteration.

    shares: which of an iteration's P prompts each optimizer step has; own: which of them this rank has, in
    the order of its rollout; everywhere: the same of all ranks, one after the other.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, observer: Observer):
        self.recipe, self.observer, self._warns = recipe, observer, ranks.main
        self.source = training_prompts(recipe)
        for note in notes(recipe) if ranks.main else ():
            logger.warning("%s", note)
        self.count = recipe.rollout.prompts_per_iteration
        self.shares = np.array_split(np.arange(self.count), recipe.train.steps_per_iteration)
        by_rank = [own_prompts(self.shares, rank, ranks.count) for rank in range(ranks.count)]
        self.own, self.everywhere = by_rank[ranks.rank], np.concatenate(by_rank)
        self._ahead = max(1, ENCODED_AHEAD * ranks.count // self.count)  # iterations

    def entries(self) -> list[dict]:
        """Every prompt there is, with its metadata."""
        return self.source.entries()

    def drawn(self, iteration: int) -> list[dict]:
        """This rank's prompts of an iteration, with their metadata."""
        drawn = self.source.draw(self.count, self.recipe.train.seed, iteration)
        return [drawn[prompt] for prompt in self.own]

    def check_scored(self, reward_PK: np.ndarray, iteration: int) -> None:
        """Raises UserError where no reward has scored anything of an iteration; a prompt of which that is
        true is warned of, once: nothing is learned from it, and a resumed run would end with it again.
        """
        left_P = np.isnan(reward_PK).all(axis=1)
        if not left_P.any():
            return
        drawn = self.source.draw(self.count, self.recipe.train.seed, iteration)
        error = unscored(drawn[int(left_P.argmax())]["prompt"])
        if left_P.all():
            raise error
        if self._warns:
            logger.warning("warning: iteration %d: %s", iteration + 1, error)
            self._warns = False

    def texts(self, begin: int, count: int = 1) -> Iterator[str]:
        """This rank's prompts of so many iterations, as far as the run goes, and their negative ones where
        they are needed."""
        for iteration in range(begin, min(begin + count, self.recipe.train.iterations)):
            yield from negative.texts(self.drawn(iteration), self.recipe.guides_training)

    def first(self, begin: int, evaluated: list[dict]) -> list[str]:
        """What is encoded before anything is loaded: for an evaluation of these, and for an iteration.

        With any negative prompt, also of a later iteration, so that a model that takes none says so now.
        """
        now = [*negative.texts(evaluated, self.recipe.guides_evaluation), *self.texts(begin)]
        return now + negative.probe([*self.entries(), *evaluated])

    def ahead(self, begin: int) -> Iterator[str]:
        """The texts of iterations from `begin` on, as many as are encoded at a time.

        Text encoders take long to load, and what they make takes megabytes a prompt.
        """
        return self.texts(begin, self._ahead)

    def counted(self, prompts: list[str]) -> Iterator[str]:
        """The same, as a phase `encoding` that the observer is told of."""
        with self.observer.phase("encoding", len(prompts)):
            for prompt in prompts:
                yield prompt
                self.observer.advance(1)
