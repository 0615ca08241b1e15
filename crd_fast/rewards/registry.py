"""The rewards of a recipe, found by name and called: see `crd_fast.rewards` for what a reward is."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from crd_fast.errors import MissingPackage, UserError, did_you_mean
from crd_fast.reward_weights import weight_of
from crd_fast.rewards.advantage import combine_pictures
from crd_fast.rewards.engine_settings import OPTIONAL, SKIP, SUGGESTED, TAKEN, engine_setting
from crd_fast.rewards.failures import answers_for, refuses
from crd_fast.rewards.foreign import check_arguments, imported, is_address
from crd_fast.rewards.lent import lent_images, lent_metadata
from crd_fast.rewards.reports import add_reported, means, unscored
from crd_fast.rewards.scoring import TIMEOUT, Reward, Scoring, checked, checked_metrics
from crd_fast.rewards.torch_state import torch_state_kept
from crd_fast.rewards.workers import Workers, served_by
from crd_fast.sizes import Resolution, height_width

# name: where the class is, imported when it is asked for
REWARDS = {
    "geneval": "crd_fast.rewards.world_geneval:WorldGenEval",
    "geneval_correct": "crd_fast.rewards.world_geneval:WorldGenEvalCorrect",
    "geneval_strict": "crd_fast.rewards.world_geneval:WorldGenEvalStrict",
    "texture_fooled": "crd_fast.rewards.world_texture:TextureFooled",
    "ocr": "crd_fast.rewards.ocr:OCR",
    "ocr_dense": "crd_fast.rewards.ocr:OCRDense",
    "easyocr": "crd_fast.rewards.easyocr:EasyOCR",
    "jpeg_compressibility": "crd_fast.rewards.image_statistics:JpegCompressibility",
    "jpeg_incompressibility": "crd_fast.rewards.image_statistics:JpegIncompressibility",
    "colorfulness": "crd_fast.rewards.image_statistics:Colorfulness",
    "diversity": "crd_fast.rewards.image_statistics:Diversity",
    "naturalness": "crd_fast.rewards.image_statistics:Naturalness",
    "geneval_mask2former": "crd_fast.rewards.geneval_detector:Mask2FormerGenEval",
    "pickscore": "crd_fast.rewards.preference:PickScore",
    "clipscore": "crd_fast.rewards.preference:CLIPScore",
    "aesthetic": "crd_fast.rewards.preference:Aesthetic",
    "hpsv2": "crd_fast.rewards.preference:HPSv2",
    "imagereward": "crd_fast.rewards.preference:ImageReward",
    "vlm": "crd_fast.rewards.vlm:VLM",
    "http": "crd_fast.rewards.http:HttpReward",
}
CALL_IMAGES = 64
TRIED, LARGEST_TRIED = 4, 1024  # pictures of noise, and their side
PER_IMAGE = "per_image"  # in what `report` returns: name to a value for each image
OWN_METRICS = ("reward/", "scored/", "judge/", "drift/")  # of evaluations, whatever rewards report

logger = logging.getLogger("crd_fast")


class Rewards:
    """Rewards by name, or themselves: a weight, or settings with a `weight` (1 if there is none).

    A key is a name as in a recipe, or a function, a class or an object of one's own; it is then known by
    `name_of`. device: where rewards with a network put it; the GPU if there is one. waits_on_host: rewards
    with a method `to(device)` are there only while `score` is at work, on the host before and after. judges:
    one may be `optional`, left out with a line where a package is missing.
    Raises UserError for a name that cannot be found or a setting that the reward does not have.
    """

    def __init__(
        self,
        config: Mapping[Any, float | Mapping],
        device: str | None = None,
        waits_on_host: bool = False,
        judges: bool = False,
    ):
        self._device, self._waits_on_host = device or default_device(), waits_on_host
        self.weights = {name: float(weight_of(value)) for name, value in by_name(config).items()}
        self._rewards: dict[str, Any] = {}
        self._calls: list[Reward] = []
        self._accepted: dict[tuple[str, str], bool] = {}  # by name and prompt
        for given, value in config.items():
            name = name_of(given)
            settings = value if isinstance(value, Mapping) else {}
            try:
                self._add(given, settings, judges)
            except MissingPackage as error:
                if not judges or settings.get(OPTIONAL) is not True:
                    raise
                logger.warning("judge %s is left out: %s", name, error)
                del self.weights[name]

    @torch_state_kept()
    def _add(self, given: Any, settings: Mapping, judges: bool) -> None:
        """Makes a reward ready. Raises MissingPackage where a package that it needs is not there."""
        name = name_of(given)
        reward, engine = load(given, settings)
        if engine.pop(OPTIONAL, False) and not judges:
            raise UserError(f"reward {name}: {OPTIONAL}: expected of judges (eval_rewards) alone")
        if hasattr(reward, "setup"):
            waits = self._waits_on_host and hasattr(reward, "to")
            with answers_for(name):
                reward.setup("cpu" if waits else self._device)
        if engine.pop(SKIP, False):
            if not hasattr(reward, "check"):
                raise UserError(
                    f"reward {name}: {SKIP}: expected of a reward that checks prompts; one without a "
                    "`check` returns None for what it does not score"
                )
            engine["fits"] = functools.partial(self._fits, name)
        self._rewards[name] = reward
        self._calls.append(Reward(name, getattr(reward, "score", reward), **engine))

    @property
    def served(self) -> dict[str, str]:
        """By name, what the servers of rewards call theirs, of those that say so."""
        said = {name: served_by(reward) for name, reward in self._rewards.items()}
        return {name: served for name, served in said.items() if served is not None}

    @property
    def can_check(self) -> bool:
        """Whether any of them may refuse prompts."""
        return any(hasattr(reward, "check") for reward in self._rewards.values())

    def check(self, metadata: list[dict], every: bool = True) -> None:
        """Raises UserError, before any work, if a reward cannot score one of these prompts.

        Of a reward that skips others' prompts, if it scores none of them; and where all do so, if a prompt is
        left that none scores, unless `every` is false.
        """
        left = np.ones(len(metadata), dtype=bool)
        for call in self._calls:
            fits = call.fitting(metadata)
            left &= ~fits
            if call.fits is None:
                try:
                    self._check(call.name, metadata)
                except UserError as error:
                    if len(self._calls) < 2 or not refuses(error):
                        raise
                    hint = f"{call.name}: {{{SKIP}: true}} leaves such prompts to the other rewards"
                    raise UserError(f"{error}; {hint}") from error.__cause__
            elif not fits.any():
                raise UserError(f"reward {call.name}: expected prompts that it scores, got none")
        if every and self._calls and left.any():
            raise unscored(metadata[int(left.argmax())]["prompt"])

    def check_cut(self, entry: dict, prompt: str) -> None:
        """The same of a prompt of which no more than `prompt` is read: what scores it must still do so."""
        for call in self._calls:
            if call.fits is None or call.fits(entry):
                self._check(call.name, [{**entry, "prompt": prompt}])

    @torch_state_kept()
    def _check(self, name: str, metadata: list[dict]) -> None:
        if hasattr(self._rewards[name], "check"):
            with answers_for(name):
                self._rewards[name].check(lent_metadata(metadata))

    def _fits(self, name: str, entry: dict) -> bool:
        """Whether the reward accepts a prompt. Asked once: a server may say otherwise later."""
        key = name, json.dumps(entry, sort_keys=True, default=repr)
        if key not in self._accepted:
            try:
                self._check(name, [entry])
                self._accepted[key] = True
            except UserError as error:
                if not refuses(error):
                    raise
                self._accepted[key] = False
        return self._accepted[key]

    def try_out(self, entries: list[dict], resolution: Resolution, samples: int = TRIED) -> None:
        """A call of every reward with pictures of noise, before anything is encoded or loaded for real ones.

        entries: prompts with their metadata. Raises UserError as `score` does.
        """
        # whether a model can draw so large is found out later
        height, width = (min(side, LARGEST_TRIED) for side in height_width(resolution))
        shape = (min(samples, TRIED), height, width, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        tried = [entries[0]]
        for call in self._calls:
            if call.fits and not any(map(call.fits, tried)):
                tried += itertools.islice(filter(call.fits, entries), 1)
        for entry in tried:
            self.score(noise, [entry] * len(noise))

    def close(self) -> None:
        """Ends the workers, which end with this process at the latest."""
        for reward in self._rewards.values():
            if isinstance(reward, Workers):
                reward.close()

    def start(self) -> Scoring:
        """Scores what is put into it, beside whatever else is done meanwhile. A context."""
        return Scoring(self._calls)

    def score(self, images: np.ndarray, metadata: list[dict]) -> dict[str, np.ndarray]:
        """Each reward's values, float64 (N,), from calls of whole prompts; NaN: not scored.

        Raises UserError for a wrong count, a NaN or no number, a reward that fails or takes too long.
        """
        with self._present(), self.start() as scoring:
            for chosen in whole_prompts([entry["prompt"] for entry in metadata]):
                scoring.put(images[chosen], metadata[chosen])
            return scoring.results()

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Within this context the networks that wait on the host are on their device."""
        waiting = [
            reward for reward in self._rewards.values() if self._waits_on_host and hasattr(reward, "to")
        ]
        try:
            for reward in waiting:
                reward.to(self._device)
            yield
        finally:
            for reward in waiting:
                reward.to("cpu")

    def combined(self, values: dict[str, np.ndarray], metadata: list[dict]) -> np.ndarray:
        """The sum by weight as in training, of values as `score` returns them, float64 (N,)."""
        return combine_pictures(values, self.weights, [entry["prompt"] for entry in metadata])

    @torch_state_kept()
    def report(
        self, images: np.ndarray, metadata: list[dict], values: dict[str, np.ndarray]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics of an evaluation: the weighted reward, each reward's mean, and what rewards report; and of
        each picture `reward`, their sum as of `combined`, and what rewards report, float64 (N,).

        values: what `score` returned for the images. Means are over what was scored; `scored/NAME` is its
        share where that is not all. Raises UserError for a report that is none, for two that differ in what
        they have in common, and where no picture has a reward.
        """
        total = self.combined(values, metadata)
        if np.isnan(total).all():
            asked = ", ".join(call.name for call in self._calls)
            raise UserError(f"evaluation: expected a reward of some pictures, got None of all by {asked}")
        metrics = {"images": len(images), "reward_mean": float(np.nanmean(total))}
        metrics |= means({call.name: values[call.name] for call in self._calls}, "reward")
        per_image = {"reward": total}
        every = {*per_image, *metrics}
        by: dict[str, str] = {}
        for call in self._calls:
            name, reward = call.name, self._rewards[call.name]
            rows = call.fitting(metadata).nonzero()[0]
            if hasattr(reward, "report") and len(rows):
                prompts = [metadata[i]["prompt"] for i in rows]
                entries = lent_metadata([metadata[i] for i in rows])
                with answers_for(name), torch.no_grad():
                    reported = dict(reward.report(lent_images(images, rows), prompts, entries))
                    each = dict(reported.pop(PER_IMAGE, {}))
                    each = {key: checked(f"{name}: {key}", of, len(rows)) for key, of in each.items()}
                own = {key for key in reported | each if key in every or key.startswith(OWN_METRICS)}
                if own:
                    raise UserError(
                        f"reward {name}: its report names {min(own)}, which evaluations have themselves"
                    )
                add_reported(name, checked_metrics(name, reported), metrics, by)
                placed = {key: np.full(len(images), np.nan) for key in each}
                for key, of in each.items():
                    placed[key][rows] = of
                add_reported(name, placed, per_image, by)
        return metrics, per_image


def whole_prompts(prompts: list[str]) -> list[slice]:
    """Parts of at most `CALL_IMAGES`, longer only where so many in a row have one prompt."""
    starts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    parts = [0]
    for start, stop in itertools.pairwise([*starts, len(prompts)]):
        if stop - parts[-1] > CALL_IMAGES and start > parts[-1]:
            parts.append(start)
    return [slice(*part) for part in itertools.pairwise([*parts, len(prompts)])]


def default_device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def name_of(reward: str | object) -> str:
    """A name as it is; of a function or class `module:name` where it can be imported so, else its own name;
    of another object its class's."""
    if isinstance(reward, str):
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)
    module = getattr(reward, "__module__", None) or ""
    importable = getattr(sys.modules.get(module), name, None) is reward
    return f"{module}:{name}" if importable and module != "__main__" else name


def by_name(config: Mapping[Any, float | Mapping]) -> dict[str, float | Mapping]:
    """The settings by the rewards' names. Raises UserError if two rewards have one name."""
    result = {name_of(reward): value for reward, value in config.items()}
    if len(result) < len(config):
        names = [name_of(reward) for reward in config]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"rewards: expected names that differ, got {twice!r} twice")
    return result


def load(name: str | object, settings: Mapping | None = None) -> tuple[Any, dict]:
    """A reward with its settings, and the engine's: `timeout`, `retries`, `workers`, `skip_others` and
    `optional`.

    With workers it is not made here but in each of them, when `setup` is called.
    name: as in a recipe, or the reward itself. Raises UserError for an unknown name (the nearest is named),
    what is no reward, an unknown setting, or one that is refused.
    """
    settings = {key: value for key, value in (settings or {}).items() if key != "weight"}
    given, reward = name, cast(Any, None)
    if not isinstance(name, str):
        reward, name = name, name_of(name)
        if not callable(reward) and not hasattr(reward, "score"):
            raise UserError(
                f"rewards: expected a name, a function, a class or an object with score, got {name}"
            )
    elif is_address(name):
        settings = {"url": name, **settings}
        reward = imported(name, REWARDS["http"])
    else:
        reward = imported(name, _path(name))
    if inspect.isclass(reward):
        known = list(inspect.signature(reward).parameters.values())
    elif hasattr(reward, "score"):
        known = []  # it has its settings
    else:  # a function's first three arguments are what it scores
        known = list(inspect.signature(reward).parameters.values())[3:]
    names = [parameter.name for parameter in known if parameter.kind is not parameter.VAR_KEYWORD]
    engine = {
        key: engine_setting(name, key, settings.pop(key))
        for key in TAKEN
        if key in settings and key not in names
    }
    if "timeout" in names:
        engine["timeout"] = math.inf  # it ends its calls itself, by a timeout that is not of one call
    unknown = [key for key in settings if key not in names]
    if unknown and len(names) == len(known):
        hint = did_you_mean(unknown[0], [*names, *SUGGESTED])
        listed = ", ".join(dict.fromkeys([*names, *SUGGESTED]))
        raise UserError(f"reward {name}: unknown setting {unknown[0]!r}{hint} (known: {listed})")
    if "workers" in engine:
        timeout = engine.get("timeout", TIMEOUT)
        return Workers(name, given, settings, engine["workers"], timeout), engine
    if not inspect.isclass(reward):
        if inspect.isfunction(reward):
            check_arguments(name, reward, settings)
        return (functools.partial(reward, **settings) if settings else reward), engine
    with answers_for(name):
        try:
            return reward(**settings), engine
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {name}: {error}") from error


def check_named(rewards: Mapping[str, Any]) -> None:
    """Raises UserError for an unknown name, or a value that a setting of the engine cannot have. Nothing is
    loaded: one's own rewards and servers are not asked."""
    for name, value in rewards.items():
        if ":" not in name:
            _path(name)
        settings = value if isinstance(value, Mapping) else {}
        for key in settings.keys() & set(TAKEN):
            engine_setting(name, key, settings[key])


def _path(name: str) -> str:
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        hint = did_you_mean(name, REWARDS)
        known = ", ".join([*REWARDS, "or file.py:name, module:name"])
        raise UserError(f"rewards: unknown reward {name!r}{hint} (known: {known})")
    return name
