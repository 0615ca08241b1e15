"""A recipe's prompts: one list or several with weights, and what is held out of them for evaluations."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.prompts.source import EVALUATED, HELDOUT, SOURCES, PromptSource, category_of, same_prompt
from crd_fast.schema import AUTO
from crd_fast.worlds import WORLDS

HELD_OUT = 10  # of so many prompts in files one is held out
FEWEST = 8  # prompts that are worth an evaluation
NEGATIVE = "negative_prompt"
LIKE_NEGATIVE = ("negativeprompt", "negative", "negprompt", "negativeprompts")  # in small letters alone


class PromptLists:
    """Lists by weight. One list's prompts are a share of every iteration's, to within a prompt.

    lists: names or files to weights; without: prompts, as `same_prompt` has them, left out of all of them;
    without_categories: too. Raises UserError for a category that none has, and where no prompt is left.
    """

    def __init__(
        self,
        lists: Mapping[str, float],
        without: frozenset[str] = frozenset(),
        without_categories: Sequence[str] = (),
    ):
        self.sources = {name: PromptSource(name, without, without_categories) for name in lists}
        if without_categories:
            _check_categories(lists, without_categories)
        for name, source in self.sources.items():
            if not source.entries():
                raise UserError(
                    f"rollout.prompts: expected some of {name} to be left for training, got none: all are "
                    "held out for evaluations or of categories that are left out"
                )
        weights = [Fraction(weight) for weight in lists.values()]
        whole = math.lcm(*(weight.numerator for weight in weights))
        # exact, so that every call agrees on the order: half the time from one turn of a list to its next
        self._halves = [int(whole / weight) for weight in weights]
        self._due = list(self._halves)  # when each list's next turn is
        self._turns: list[int] = []  # whose each position of the run is, as far as it was asked for

    def entries(self) -> list[dict]:
        """Every prompt there is, list by list."""
        return [entry for source in self.sources.values() for entry in source.entries()]

    def draw(self, count: int, seed: int, iteration: int) -> list[dict]:
        """The prompts of one training iteration: a function of seed and iteration alone.

        The lists take turns, so that every part of an iteration has its share of each: the k-th turn of one
        with weight w comes at time (k - 1/2) / w, of two at one time the first's.
        """
        first = iteration * count
        while len(self._turns) < first + count:
            turn = self._due.index(min(self._due))
            self._turns.append(turn)
            self._due[turn] += 2 * self._halves[turn]
        before, turns = self._turns[:first], self._turns[first : first + count]
        drawn = [
            iter(source.draw(before.count(i), turns.count(i), seed, iteration, stream=i))
            for i, source in enumerate(self.sources.values())
        ]
        return [next(drawn[turn]) for turn in turns]


def training_prompts(recipe: Recipe) -> PromptLists:
    """The prompts of `rollout.prompts`, without what is held out of them."""
    without = frozenset(_split(recipe)) if splits(recipe) else frozenset()
    return PromptLists(recipe.rollout.prompt_lists, without, recipe.rollout.without_categories)


def _check_categories(lists: Iterable[str], left_out: Sequence[str]) -> None:
    known: dict[str, None] = {}
    for name in lists:
        tags = dict.fromkeys(map(category_of, PromptSource(name).entries()))
        if not tags.keys() - set(left_out):
            raise UserError(
                f"rollout.without_categories: expected some prompts of {name} to be left, got none"
            )
        known |= tags
    for category in left_out:
        if category not in known:
            listed = ", ".join(filter(None, known)) or "none"
            raise UserError(
                f"rollout.without_categories: expected categories of the prompts ({listed}), got {category!r}"
            )


def evaluation_prompts(recipe: Recipe) -> list[dict]:
    """The prompts of `evaluate.prompts`, the same ones every time.

    Raises UserError where it is `auto` and the files have too few prompts for some to be held out, or all
    lists are themselves held out of others.
    """
    wanted, limit = recipe.evaluate.prompts, recipe.evaluate.max_prompts
    if wanted != AUTO:
        return PromptSource(wanted).all(limit)
    if recipe.model.path in WORLDS:
        return PromptSource(recipe.model.path + HELDOUT).all(limit)
    parts: dict[str, list[dict]] = {}
    for name in recipe.rollout.prompt_lists:
        if name in SOURCES:
            parts[name] = PromptSource(name + HELDOUT).all(limit)
    if own_files(recipe) and not splits(recipe):
        raise UserError("evaluate.prompts: expected a file: with evaluate.every: 0 no prompts are held out")
    if splits(recipe):
        parts[""] = list(_split(recipe).values())
    if not parts:
        named = ", ".join(recipe.rollout.prompt_lists)
        raise UserError(f"evaluate.prompts: expected a file or a list: nothing is held out of {named}")
    limit, total = limit or EVALUATED, sum(map(len, parts.values()))
    if total > limit:  # of each list its part
        parts = {name: found[: max(1, limit * len(found) // total)] for name, found in parts.items()}
    return [entry for found in parts.values() for entry in found][:limit]


def evaluated_lists(recipe: Recipe) -> list[str]:
    """The names and files that `evaluation_prompts` reads."""
    wanted = recipe.evaluate.prompts
    if wanted != AUTO:
        return [wanted]
    if recipe.model.path in WORLDS:
        return [recipe.model.path + HELDOUT]
    shipped = [name + HELDOUT for name in recipe.rollout.prompt_lists if name in SOURCES]
    return [*shipped, *own_files(recipe)]


def splits(recipe: Recipe) -> bool:
    """Whether prompts are held out of the files for training."""
    own = recipe.evaluate.prompts == AUTO and recipe.model.path not in WORLDS
    return bool(recipe.evaluate.every) and own and bool(own_files(recipe))


def own_files(recipe: Recipe) -> list[str]:
    """The lists of `rollout.prompts` that are files, and not lists that ship."""
    return [name for name in recipe.rollout.prompt_lists if name.removesuffix(HELDOUT) not in SOURCES]


def _read(recipe: Recipe) -> dict[str, dict]:
    """The different prompts of all files, by what makes them the same, the first of each."""
    found: dict[str, dict] = {}
    for name in own_files(recipe):
        for entry in PromptSource(name).entries():
            found.setdefault(same_prompt(entry["prompt"]), entry)
    return found


def _split(recipe: Recipe) -> dict[str, dict]:
    """What is held out: a tenth of the files' different prompts, at most `EVALUATED`, by their hashes.

    So it depends on the prompts alone: not on their order, the seed, or how many of them are evaluated.
    """
    found = _read(recipe)
    count = min(len(found) // HELD_OUT, EVALUATED)
    if count < FEWEST:
        raise UserError(
            f"evaluate.prompts: {len(found)} different prompts for training are too few to hold some out "
            f"(expected at least {FEWEST * HELD_OUT}); name a file of others, or set evaluate.every: 0"
        )
    by_hash = sorted(found, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return {prompt: found[prompt] for prompt in by_hash[:count]}


def notes(recipe: Recipe) -> Iterator[str]:
    """What people should know of their prompts, a line each: what is held out of files, duplicates in them,
    and prompts that are both trained on and evaluated, of lists that ship too."""
    files = own_files(recipe)
    if splits(recipe):
        held_out, there = len(_split(recipe)), len(_read(recipe))
        yield (
            f"held out: {held_out} of {there} prompts are never trained on and are what is evaluated "
            "(evaluate.prompts names others)"
        )
    for name in files:
        counts = Counter(same_prompt(entry["prompt"]) for entry in PromptSource(name).entries())
        if twice := [prompt for prompt, count in counts.items() if count > 1]:
            yield (
                f"warning: {name}: duplicates of {len(twice)} of its {len(counts)} different prompts, "
                f"{counts.total()} in all: {_short(twice[0])}"
            )
    for name in files:
        for key in dict.fromkeys(key for entry in PromptSource(name).entries() for key in entry):
            if key != NEGATIVE and re.sub(r"[\W_]+", "", key.lower()) in LIKE_NEGATIVE:
                yield f"warning: {name}: {key!r} is metadata like any other; expected {NEGATIVE} for guidance"
    seen: dict[str, str] = {}
    for name in files:
        trained = PromptSource(name, without_categories=recipe.rollout.without_categories).entries()
        own = dict.fromkeys(same_prompt(entry["prompt"]) for entry in trained)
        if both := [prompt for prompt in own if prompt in seen]:
            many = "prompt stands" if len(both) == 1 else "prompts stand"
            yield f"warning: {len(both)} {many} in {name} and in {seen[both[0]]}: {_short(both[0])}"
        seen |= {prompt: name for prompt in own if prompt not in seen}
    if not (recipe.guides_training or recipe.guides_evaluation):
        read = (entry for name in files for entry in PromptSource(name).entries())
        if any(entry.get(NEGATIVE) for entry in read):
            yield (
                "warning: negative prompts do nothing without guidance (loss.guidance_scale, "
                "rollout.guidance_scale, evaluate.guidance_scale)"
            )
    if recipe.evaluate.every:
        trained_on = {same_prompt(entry["prompt"]) for entry in training_prompts(recipe).entries()}
        evaluated = dict.fromkeys(same_prompt(entry["prompt"]) for entry in evaluation_prompts(recipe))
        if both := [prompt for prompt in evaluated if prompt in trained_on]:
            yield (
                f"warning: of {len(evaluated)} evaluated prompts {len(both)} stand in rollout.prompts too: "
                f"{_short(both[0])}"
            )


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:60] + "...")
