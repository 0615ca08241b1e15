"""What a run costs: FLOPs into hours on a named card, seconds of slow rewards, disk and host memory.

Hours have two figures. The bound is what no program can beat: all FLOPs at the card's peak, or, where blocks
are streamed, their bytes over the host link. The estimate takes a stated fraction of the peak, an assumption
until an iteration has been measured. Neither counts loading, the encoding of prompts or the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.negative import texts
from crd_fast.models.prompt_cache import GIB
from crd_fast.plan.gpus import Card
from crd_fast.plan.planner import Plan
from crd_fast.plan.rewards import waiting_bytes
from crd_fast.prompts.lists import evaluation_prompts, training_prompts
from crd_fast.sizes import pixels
from crd_fast.worlds import WORLDS

EFFICIENCY = 0.4  # of the peak, where nobody says otherwise: an assumption
# Rewards that are slow on the CPU: seconds a picture on one thread, by name and mode, with the detector's
# default side. By benchmarks/measure_ocr.py, results/ocr.json (scene, seconds_a_word), and for easyocr by
# benchmarks/measure_easyocr.py, results/easyocr-scenes.json (easyocr_by_default, cpu_seconds_a_picture).
SLOW_REWARDS = {("ocr", "scene"): 0.35, ("ocr_dense", "scene"): 0.35, ("easyocr", "scene"): 2.1}
DEFAULTS = {"ocr": ("scene", 736), "ocr_dense": ("word", 736), "easyocr": ("word", 512)}  # mode and side


@dataclass(frozen=True)
class Cost:
    """One run's cost. Seconds and hours are None where no card is named."""

    plan: Plan
    card: Card | None
    efficiency: float
    precision: str
    iterations: int
    first_checkpoint: int  # iteration
    pictures: int  # of one iteration
    evaluations: int  # in the whole run
    evaluated: int  # pictures of one evaluation
    evaluation_flops: float  # of one
    guided_base_flops: float  # of the base with guidance, drawn once; 0 where it is not
    guided_base_scored: int  # pictures of it that are scored
    checkpoint_evaluations: int  # up to the first checkpoint
    reward_seconds: float  # of one picture, on the CPU
    judge_seconds: float  # the same, of an evaluation's pictures alone
    prompts: int | None  # that are encoded; None where the prompts cannot be read here
    prompt_cache_bytes: int  # the most that is kept of them
    checkpoint_minutes: float
    checkpoints: int  # the most that are there at a time
    published_here: bool  # nothing is downloaded
    pixels: int  # of the largest picture
    prompts_per_iteration: int
    waiting_bytes: int  # of networks that wait on the host for evaluations
    # forwards, each of a micro-batch: of an iteration's rollout, an evaluation, and the base with guidance
    rollout_forwards: int
    evaluation_forwards: int
    guided_base_forwards: int

    # -- time ---------------------------------------------------------------------------------------------

    def seconds(self, flops: float, efficiency: float = 1.0) -> float | None:
        return flops / (self.card.tflops * 1e12 * efficiency) if self.card else None

    @property
    def has_estimate(self) -> bool:
        """The table's throughput is bfloat16's; in float32 only the bound holds."""
        return self.card is not None and self.precision == "bf16"

    def _iteration(self, efficiency: float, rewards: bool = True) -> float:
        """Pictures are scored while the next are generated, so that the slower of the two counts; blocks are
        fetched while others compute."""
        flops = self.plan.flops
        generating = self.seconds(flops["rollout"] + flops["decode"], efficiency) or 0.0
        updating = self.seconds(flops["update"], efficiency) or 0.0
        rollout_bytes = self.rollout_forwards * self.plan.forward_bytes
        generating = max(generating, self._fetching(rollout_bytes))
        updating = max(updating, self._fetching(self.plan.streamed_bytes - rollout_bytes))
        return max(generating, self.reward_seconds * self.pictures * rewards) + updating

    def _fetching(self, bytes_: float) -> float:
        """Seconds on the link to the host."""
        return bytes_ / (self.card.link * 1e9) if self.card else 0.0

    def _of_forwards(self, flops: float, forwards: int, efficiency: float = 1.0) -> float:
        """Seconds of pictures that are made, by computing or by fetching blocks."""
        return max(self.seconds(flops, efficiency) or 0.0, self._fetching(forwards * self.plan.forward_bytes))

    @property
    def bound(self) -> float | None:
        """Seconds of an iteration that no program can beat; rewards are not in it."""
        if self.card is None:
            return None
        return self._iteration(1.0, rewards=False)

    @property
    def iteration(self) -> float | None:
        """Seconds of an iteration by the estimate."""
        return self._iteration(self.efficiency) if self.has_estimate else None

    @property
    def evaluation(self) -> float | None:
        """Seconds of an evaluation by the estimate. Its pictures are scored after all are there."""
        if not self.has_estimate:
            return None
        making = self._of_forwards(self.evaluation_flops, self.evaluation_forwards, self.efficiency)
        return making + (self.reward_seconds + self.judge_seconds) * self.evaluated

    def _hours(self, iterations: int, evaluations: int) -> float | None:
        if self.iteration is None or self.evaluation is None:
            return None
        seconds = iterations * self.iteration + evaluations * self.evaluation
        seconds += self._of_forwards(self.guided_base_flops, self.guided_base_forwards, self.efficiency)
        seconds += (self.reward_seconds + self.judge_seconds) * self.guided_base_scored
        return seconds / 3600

    @property
    def hours(self) -> float | None:
        """Hours of the whole run, by the estimate."""
        return self._hours(self.iterations, self.evaluations)

    @property
    def hours_to_checkpoint(self) -> float | None:
        """Until the first checkpoint is there, by the estimate: of iterations or of time."""
        by_iterations = self._hours(self.first_checkpoint, self.checkpoint_evaluations)
        if by_iterations is None or self.iteration is None:
            return None
        first = max(1, math.ceil(60 * self.checkpoint_minutes / self.iteration))
        by_time = self._hours(first, min(self.checkpoint_evaluations, 1))
        return by_iterations if by_time is None else min(by_iterations, by_time)

    @property
    def bound_hours(self) -> float | None:
        """Hours of the whole run, by the lower bound."""
        if self.bound is None:
            return None
        evaluating = self.evaluations * self._of_forwards(self.evaluation_flops, self.evaluation_forwards)
        evaluating += self._of_forwards(self.guided_base_flops, self.guided_base_forwards)
        return (self.iterations * self.bound + evaluating) / 3600

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        evaluating = self.evaluations * self.evaluation_flops + self.guided_base_flops
        return self.iterations * sum(self.plan.flops.values()) + evaluating

    # -- space --------------------------------------------------------------------------------------------

    @property
    def disk(self) -> dict[str, int]:
        """Bytes: of encoded prompts in the cache, of what is downloaded, of checkpoints."""
        sizes = self.plan.sizes
        found = {"checkpoints": sizes["checkpoint"] * self.checkpoints}
        if "published" in sizes:
            found["prompt cache"] = min(sizes["prompt"] * (self.prompts or 0), self.prompt_cache_bytes)
            found["downloads"] = 0 if self.published_here else sizes["published"]
        return found

    def host_bytes(self, encoders_on_host: bool) -> int:
        """Host memory beside the process and its libraries.

        What waits for evaluations, and the larger of two: the text encoders; or, when they are gone, pinned
        memory, the VAE while it does not decode, and an iteration's prompts and pictures.
        """
        own = self.plan.host_bytes + self.plan.sizes.get("VAE", 0)
        own += self.plan.sizes["prompt"] * self.prompts_per_iteration
        own += self.pictures * 3 * self.pixels
        encode = self.plan.phases.get("encode")
        encoding = encode.bytes - encode.parts.get("rewards", 0) if encode and encoders_on_host else 0
        return self.waiting_bytes + max(own, encoding)

    def to_json(self) -> dict[str, Any]:
        reward = self.reward_seconds * self.pictures
        return {
            "card": self.card.to_json() if self.card else None,
            "efficiency": self.efficiency,
            "iterations": self.iterations,
            "flops_per_evaluation": self.evaluation_flops,
            "evaluations": self.evaluations,
            "flops_of_guided_base": self.guided_base_flops,
            "flops_of_run": self.flops,
            "seconds_per_iteration": {"bound": self.bound, "estimate": self.iteration, "reward": reward},
            "seconds_per_evaluation": self.evaluation,
            "hours": {"bound": self.bound_hours, "estimate": self.hours},
            "hours_to_first_checkpoint": self.hours_to_checkpoint,
            "prompts": self.prompts,
            "disk_bytes": self.disk,
        }


def cost(recipe: Recipe, plan: Plan, card: Card | None = None, efficiency: float = EFFICIENCY) -> Cost:
    """The cost of the recipe's run by its plan. efficiency: above 0, at most 1."""
    iterations, every = recipe.train.iterations, recipe.evaluate.every
    first = min(recipe.checkpoint.every, iterations)
    evaluated = _evaluated(recipe) if every else 0
    forwards = recipe.evaluate.steps * (2 if recipe.evaluate.guidance_scale > 1 else 1)
    if recipe.evaluate.drift is not None:
        forwards += 3 if recipe.evaluate.drift > 1 else 2
    row_flops = plan.evaluation_row_flops or plan.row_flops
    flops = row_flops["sampler"] * forwards + row_flops["decode"]
    guided = row_flops["sampler"] * 2 * recipe.evaluate.steps + row_flops["decode"]
    features = recipe.evaluate.features is not None and every > 0
    guided_scales = {recipe.guided_base, recipe.evaluate.drift if features else None} - {None}
    pictures = recipe.rollout.prompts_per_iteration * recipe.rollout.samples_per_prompt
    # as many rows in each as in the rollout's
    batch = plan.rollout_micro_batch * (2 if recipe.rollout.guidance_scale > 1 else 1)
    return Cost(
        plan,
        card,
        efficiency,
        recipe.train.precision,
        iterations,
        first,
        pictures,
        evaluations=evaluations(every, iterations, iterations),
        evaluated=evaluated,
        evaluation_flops=evaluated * flops,
        guided_base_flops=evaluated * guided * len(guided_scales),  # pictures of one scale are drawn once
        guided_base_scored=0 if recipe.guided_base is None else evaluated,
        checkpoint_evaluations=evaluations(every, first, iterations),
        reward_seconds=sum(reward_seconds(name, value) for name, value in recipe.rewards.items()),
        judge_seconds=sum(reward_seconds(name, value) for name, value in recipe.eval_rewards.items()),
        prompts=_encoded_prompts(recipe),
        prompt_cache_bytes=round(recipe.model.prompt_cache_gb * GIB),
        checkpoint_minutes=recipe.checkpoint.minutes,
        # the best beside the newest, and one that is being written; time may make one of any iteration
        checkpoints=min(iterations, recipe.checkpoint.keep + (every > 0) + 1),
        published_here=Path(recipe.model.path).is_dir(),
        pixels=max(map(pixels, recipe.rollout.sizes)),
        prompts_per_iteration=recipe.rollout.prompts_per_iteration,
        waiting_bytes=waiting_bytes(recipe),
        rollout_forwards=math.ceil(pictures / plan.rollout_micro_batch) * recipe.rollout.steps,
        evaluation_forwards=math.ceil(evaluated / batch * forwards),
        guided_base_forwards=math.ceil(evaluated / batch * 2 * recipe.evaluate.steps) * len(guided_scales),
    )


def evaluations(every: int, until: int, iterations: int) -> int:
    """How many there are from iteration 0 to `until`, both included: the last iteration has one as well."""
    if not every:
        return 0
    return 1 + until // every + (until == iterations and until % every != 0)


def reward_seconds(name: str, value: Any) -> float:
    """Seconds on the CPU for one picture, 0 where a reward is not known to be slow.

    value: the weight or the settings that the recipe gives it; a number of workers shares them, and `auto`
    counts as one.
    """
    settings: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    mode, side = DEFAULTS.get(name, ("", 0))
    if settings.get("side", side) != side:  # the detector's time was measured at its default
        return 0.0
    workers = settings.get("workers", 1)
    seconds = SLOW_REWARDS.get((name, str(settings.get("mode", mode))), 0.0)
    return seconds / workers if isinstance(workers, int) else seconds


def _evaluated(recipe: Recipe) -> int:
    """Pictures of an evaluation; 0 where its prompts cannot be read here."""
    try:
        entries = evaluation_prompts(recipe)
    except UserError:
        return 0
    return len(entries) * recipe.evaluate.samples_per_prompt


def _encoded_prompts(recipe: Recipe) -> int | None:
    """Different prompts that a run encodes, the empty one among them."""
    if recipe.model.path in WORLDS:
        return 0
    rollout, iterations = recipe.rollout, recipe.train.iterations
    found = {""}
    try:
        source = training_prompts(recipe)
        if len(source.entries()) <= rollout.prompts_per_iteration * iterations:
            found.update(texts(source.entries(), recipe.guides_training))
        else:
            for iteration in range(iterations):
                drawn = source.draw(rollout.prompts_per_iteration, recipe.train.seed, iteration)
                found.update(texts(drawn, recipe.guides_training))
        if recipe.evaluate.every:
            evaluated = evaluation_prompts(recipe)
            found.update(texts(evaluated, recipe.guides_evaluation))
    except UserError:
        return None
    return len(found)
