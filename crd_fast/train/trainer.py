"""Centered Reward Distillation, the loop.

Every random choice is a function of the seed and the iteration, so that a resumed run makes the same ones.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from crd_fast.config import Recipe, build_recipe
from crd_fast.errors import UserError, reason_of
from crd_fast.models import compile_blocks, load_model
from crd_fast.models.base import FlowModel
from crd_fast.ranks import Ranks, check_ranks
from crd_fast.rewards import Rewards, by_name, needs_consent
from crd_fast.rewards.advantage import advantages, combine, kinds, uncertain
from crd_fast.rewards.consent import OPTION
from crd_fast.run import profiling
from crd_fast.run.gpu_memory import GpuMemory
from crd_fast.run.log import SMALLEST_SPACE, RunLog, refuse_full
from crd_fast.run.machine import peak_rss_bytes
from crd_fast.run.observer import NOBODY, Observer, Observers, observed
from crd_fast.run.row_counts import Throughput
from crd_fast.run.scores import guided_base_path, scores_path
from crd_fast.run.watch import reward_metrics
from crd_fast.schema import Schedule
from crd_fast.train.checkpoints import Checkpoints
from crd_fast.train.evaluate import Evaluation, HeldOut, guided_base_metrics
from crd_fast.train.features import FeatureDistance
from crd_fast.train.iteration_prompts import IterationPrompts
from crd_fast.train.iteration_rollout import Embeddings, IterationRollout
from crd_fast.train.micro_batch import first_sentence, resolve_micro_batch
from crd_fast.train.pairs import Pairs, draw_pairs
from crd_fast.train.places import absolute
from crd_fast.train.prompt_lengths import check_prompts
from crd_fast.train.run_evaluation import evaluate_run
from crd_fast.train.signal import Signal
from crd_fast.train.steps import FiniteSteps
from crd_fast.train.stopping import StopNow, Stopping
from crd_fast.train.update import Updater
from crd_fast.weights import checkpoint
from crd_fast.weights.lora_file import lora_file
from crd_fast.weights.make import make_optimizer, make_weights
from crd_fast.weights.sets import SNAPSHOTS

logger = logging.getLogger("crd_fast")


class Trainer:
    """One run in one output folder. `resume` goes on from the folder's newest checkpoint.

    rewards: in place of the recipe's, as `Rewards` takes them: functions, classes and objects too. The folder
    keeps their names; where a name is none that can be imported, later commands that score need it given
    again. observer: is told of what happens; `trainer.observer.add` adds another. row_flops: by a plan, for
    the metric `tflops`.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        resume: bool = False,
        *,
        rewards: Mapping[str | object, float | Mapping] | None = None,
        observer: Observer = NOBODY,
        row_flops: Mapping[str, float] | None = None,
    ):
        if rewards is not None:
            recipe = build_recipe({**recipe.model_dump(), "rewards": by_name(rewards)})
        recipe = absolute(recipe)
        evaluates = recipe.evaluate.every > 0
        recipe.check_own(trains=True, evaluates=evaluates)
        # absolute, as a reward may change the working directory; and as given, for messages
        self.recipe, self.output, self._output_as_given = recipe, output.absolute(), output

        # who takes part, and who watches
        profiler = profiling.start(recipe.train.profile)
        self.ranks = Ranks()
        self.stopping = Stopping(alone=self.ranks.count == 1, say=self.ranks.main)
        self.throughput, self.memory = Throughput(row_flops), GpuMemory()
        self.observer = Observers(profiler, self.throughput, self.memory, observer, self.stopping)
        check_ranks(recipe, self.ranks.count)

        # where it begins: at iteration 0, or at the checkpoint that a resumed run goes on from
        self.checkpoints = Checkpoints(self.output, recipe, self.ranks, resume)
        newest, state = self.checkpoints.newest, self.checkpoints.state
        self.iteration: int = state["iteration"] if state else 0
        self.step: int = state["step"] if state else 0

        # what is refused before anything is loaded, and first what is soon known
        self.rewards = Rewards(recipe.rewards if rewards is None else rewards)
        self.checkpoints.check_served(self.rewards.served)
        self.prompts = IterationPrompts(recipe, self.ranks, self.observer)
        refuse_full(output, SMALLEST_SPACE)
        self.rewards.check(self.prompts.entries())
        held_out = HeldOut(recipe, self.rewards) if evaluates else None
        self.features = None
        if held_out and recipe.evaluate.features is not None:
            pictures = len(held_out.entries) * recipe.evaluate.samples_per_prompt
            self.features = FeatureDistance(recipe, self.output, pictures, self.ranks, self.observer)
        self.rewards.try_out(self.prompts.entries(), recipe.size_of(0), recipe.rollout.samples_per_prompt)
        init_lora = None if recipe.model.init_lora is None else Path(recipe.model.init_lora)
        if init_lora and not newest:
            lora_file(init_lora)

        # the model and the weights that are trained
        self.model = self._load_model(held_out)
        if newest and state:
            self.description = checkpoint.check_same_model(state, self.model, newest, trains=True)
        else:
            self.description = checkpoint.describe(self.model)
        self.weights = make_weights(self.model, recipe)
        if init_lora and not newest:
            self.weights.start_from(init_lora)
        if recipe.train.compile:
            compile_blocks(self.model.transformer)
        self.optimizer = make_optimizer(recipe, self.weights.trained())
        self.optimizer.register_step_post_hook(lambda *_: self.weights.stepped())
        if newest:
            checkpoint.load(newest, self.weights, self.weights.resuming(self.optimizer))
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.train.learning_rate  # may have been changed since

        # what an iteration does with them
        self.rollout = IterationRollout(
            recipe, self.output, self.model, self.weights, self.prompts, self.ranks, self.observer
        )
        self.signal = None
        if recipe.train.timestep_sampling == "by-signal":
            self.signal = Signal(recipe.rollout.steps, state["signal"] if state else None)
        self.updater = Updater.of(recipe, self.model, self.weights, self.signal, self.observer)
        self.finite_steps = FiniteSteps(say=self.ranks.main)
        self.schedules = {name: Schedule.parse(getattr(recipe.snapshots, name)) for name in SNAPSHOTS}
        self.evaluation = self._make_evaluation(held_out) if held_out else None

        # the present iteration's line of the metrics, without an evaluation, and whether the log lacks it, or
        # its evaluation: of a new run the first one, of a resumed one what was saved and not yet logged
        self._record: dict = {"iteration": 0, "step": 0}
        if state:
            self._record = state.get("record") or {}  # earlier versions logged before they saved
        self._unlogged = bool(self._record) and self.checkpoints.is_unlogged(self._evaluates())
        if self.ranks.main:
            self.checkpoints.hold()
            self.log = RunLog(self.output, recipe, self._next_logged() if resume else None)

    def _load_model(self, held_out: HeldOut | None) -> FlowModel:
        """The recipe's model, once the prompts that come first are encoded."""
        trained = self.prompts.entries(), self.rewards
        with self.ranks.main_first():  # it fills the cache of encoded prompts
            return load_model(
                self.recipe,
                self.prompts.first(self.iteration, held_out.entries if held_out else []),
                self.prompts.ahead(self.iteration),
                self.prompts.counted,
                lambda model: check_prompts(model, self.recipe, held_out, trained, say=self.ranks.main),
            )

    def _make_evaluation(self, held_out: HeldOut) -> Evaluation:
        trained = {entry["prompt"] for entry in self.prompts.entries()}
        # one of its own: that an evaluation does not fit says nothing about the rollout
        micro_batch = resolve_micro_batch(self.recipe.rollout.micro_batch, fixed=self.weights.sharded)
        return Evaluation(self.model, self.recipe, self.rewards, micro_batch, self.ranks, held_out, trained)

    def _next_logged(self) -> int:
        """The iteration that a resumed run logs next; lines from there on are dropped."""
        if not self.checkpoints.newest:
            return 0  # it was stopped before its first checkpoint, and starts over in the same folder
        return self.iteration if self._unlogged else self.iteration + 1

    def run(self) -> bool:
        """Trains to the recipe's last evaluation. False if a signal ended it earlier, with a checkpoint.

        What ends a run otherwise leaves a checkpoint too, of the last iteration, where no step of the next
        one was made.
        """
        with closing(self.checkpoints), self.stopping.listening():
            try:
                self._run()
            except StopNow:
                self._save_whole()
            except Exception as error:
                saved = False
                if self.ranks.count == 1 and self.stopping.whole:
                    try:
                        self._save_whole()
                        saved = True
                    except UserError as second:
                        logger.warning("warning: %s", second)
                if not (saved and self.stopping.requested):  # or a child may have got the signal too
                    if isinstance(error, torch.OutOfMemoryError):
                        found = f"out of memory: {first_sentence(error)}"
                        raise UserError(f"iteration {self.iteration + 1}: {found}") from error
                    raise
                logger.warning("warning: it stops before the iteration ends: %s", reason_of(error))
        if self.ranks.main:
            self.log.close()
        return self.iteration >= self.recipe.train.iterations and not self._unlogged

    def _save_whole(self) -> None:
        """A checkpoint of the last iteration, unless there is one, and what was generated of the next."""
        for parameter in self.weights.trained():
            parameter.grad = None
        if self.checkpoints.saved != self.iteration:
            self.save()
            logger.warning("saved iteration %d: %s", self.iteration, self.resume_command)
        self.rollout.partial.keep()

    @property
    def resume_command(self) -> str:
        """What goes on with this run, as it can be typed."""
        return self.command("train", "--resume")

    def command(self, *words: str) -> str:
        """One that loads this run, whose folder ends it, and its rewards, as it can be typed."""
        consent = [OPTION] if needs_consent(self.recipe) else []
        return shlex.join(["crd-fast", *words, str(self._output_as_given), *consent])

    def _run(self) -> None:
        if self._unlogged:
            self._conclude(dict(self._record))
            self._unlogged = False
        while self.iteration < self.recipe.train.iterations and not self._asked_to_stop():
            with self.rollout.partial.iteration():
                record = self.iterate()
            self._record = dict(record)
            due = self._due(self.recipe.checkpoint.every) or self._evaluates()
            if due or self._asked_to_stop() or self.checkpoints.long_ago():
                self.save()  # before the evaluation, which may take long or fail
            self._conclude(record)
            self.observer.iteration_done(record)
        if self.checkpoints.saved != self.iteration:
            self.save()

    def _asked_to_stop(self) -> bool:
        return self.ranks.any(self.stopping.requested)

    def _due(self, every: int) -> bool:
        return bool(every) and (self.iteration % every == 0 or self.iteration == self.recipe.train.iterations)

    def _evaluates(self) -> bool:
        """Whether the present iteration ends with an evaluation."""
        return self.evaluation is not None and self._due(self.recipe.evaluate.every)

    def _conclude(self, record: dict) -> None:
        """Logs an iteration, with an evaluation where one is due."""
        if self.evaluation is not None and self._evaluates():
            self._log_evaluation(self.evaluation, record)
        else:
            self._log(record)

    @observed("iteration")
    def iterate(self) -> dict:
        """Rollout, rewards, updates, snapshots. Returns the iteration's metrics."""
        clock = [time.perf_counter()]
        with self._located(), self.rewards.start() as scoring:
            embeddings, negatives, latents_N = self.rollout.generate(self.iteration, scoring)
            clock.append(time.perf_counter())
            scores_PK = self.rollout.scores(scoring)
            reward_PK = combine(scores_PK, self.rewards.weights, self.recipe.advantage.aggregate)
            self.prompts.check_scored(reward_PK, self.iteration)
        clock.append(time.perf_counter())
        kind_P = kinds(scores_PK, self.rewards.weights)
        advantage_PK = advantages(reward_PK, self.recipe.advantage.std, kind_P)
        strength_PK = self.updater.objective.anchor_strength(advantage_PK)
        if self.recipe.loss.anchor_uncertain < 1:
            strength_PK *= uncertain(scores_PK, self.rewards.weights, self.recipe.loss.anchor_uncertain)
        pairs_by_step = self._pairs(
            advantage_PK=advantage_PK, anchor_strength_PK=strength_PK, scored_PK=~np.isnan(reward_PK)
        )
        updates = self._update(pairs_by_step, latents_N, embeddings, negatives)
        decays = {name: schedule(self.step) for name, schedule in self.schedules.items()}
        for name, decay in decays.items():
            with self.observer.phase("snapshots"):
                self.weights.blend(name, decay)
        clock.append(time.perf_counter())

        self.iteration += 1
        seconds = dict(zip(("seconds_rollout", "seconds_reward", "seconds_update"), np.diff(clock).tolist()))
        return {
            "iteration": self.iteration,
            "step": self.step,
            **self.checkpoints.trained_since,
            **reward_metrics(scores_PK, self.rewards.weights),
            **updates,
            **{f"{name}_decay": decay for name, decay in decays.items()},
            **seconds,
            **self.throughput.metrics(reward_PK.size - self.rollout.partial.taken, len(latents_N), seconds),
            **self.memory.metrics(),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _pairs(self, **values_PK: np.ndarray) -> list[Pairs]:
        """This rank's pairs of each of the iteration's optimizer steps, which have a share of the prompts."""
        sigmas = self.model.sigmas(self.recipe.rollout.steps, self.recipe.size_of(self.iteration))
        signal = self.signal.sizes() if self.signal else None
        by_step = (
            draw_pairs(self.recipe, self.iteration, sigmas, prompts, signal=signal, **values_PK)
            for prompts in self.prompts.shares
        )
        samples = self.recipe.rollout.samples_per_prompt
        return [pairs.of_prompts(self.prompts.own, samples) for pairs in by_step]

    def _update(
        self,
        pairs_by_step: list[Pairs],
        latents_N: torch.Tensor,
        embeddings: Embeddings,
        negatives: Embeddings,
    ) -> dict[str, float]:
        """The iteration's optimizer steps. Returns the mean metrics."""
        collected = []
        with self.observer.phase("update", sum(map(len, pairs_by_step))):
            for pairs in pairs_by_step:
                metrics = self.updater.accumulate(pairs, latents_N, embeddings, negatives)
                metrics = self.ranks.mean(metrics)
                metrics["grad_norm"] = self.weights.finish_gradients(
                    self.ranks, self.recipe.train.max_grad_norm
                )
                with self._located():
                    usable = self.finite_steps.usable(metrics, self.iteration + 1)
                if usable:
                    with self.observer.phase("optimizer"):
                        self.optimizer.step()
                        self.step += 1
                        self._average()
                    collected.append(metrics)
                self.optimizer.zero_grad(set_to_none=True)
        if self.signal:
            self.signal.end_iteration(self.ranks)
        means = {name: sum(m[name] for m in collected) / len(collected) for name in next(iter(collected), ())}
        left_out = len(pairs_by_step) - len(collected)
        return means | ({"steps_left_out": left_out} if left_out else {})

    def _average(self) -> None:
        """The average of the policy, where the recipe has one, after an optimizer step."""
        if self.recipe.snapshots.ema is not None:
            self.weights.blend("ema", self.recipe.snapshots.ema_decay(self.step))

    def _log_evaluation(self, evaluation: Evaluation, record: dict) -> None:
        try:
            result, guided_base, seconds = evaluate_run(
                evaluation, self.weights, self.features, self.observer, with_guided_base=not self.iteration
            )
        except Exception:
            self._unlogged = True
            if self.iteration:
                self._log(record)  # a resumed run makes the evaluation, and this line anew
            raise
        if result.scores is None:
            return
        record |= result.metrics | seconds | self.memory.metrics() | self.checkpoints.evaluated_since
        samples, iteration = self.output / "samples", self.iteration
        grid = evaluation.save(result, samples, f"{iteration:06d}", scores_path(self.output, iteration))
        if guided_base is not None:
            record |= guided_base_metrics(guided_base.metrics, self.recipe.guided_base)
            evaluation.save(guided_base, samples, "guided_base", guided_base_path(self.output))
        self._log(record, grid)
        self.checkpoints.evaluated(record)
        self.observer.evaluated(record)

    def _log(self, record: dict, grid: np.ndarray | None = None) -> None:
        if self.ranks.main:
            self.log.write(record, grid)

    @observed("checkpoint")
    def save(self) -> None:
        """Writes a checkpoint of this iteration."""
        weights, optimizer = self.weights.gathered(self.optimizer, self.ranks)
        self.checkpoints.save(
            weights,
            optimizer,
            {
                "iteration": self.iteration,
                "step": self.step,
                "model": self.description,
                "processes": self.ranks.count,
                "signal": self.signal.state if self.signal else None,
                "record": self._record,
            },
        )

    @contextmanager
    def _located(self) -> Iterator[None]:
        """Errors within say in which iteration they came."""
        try:
            yield
        except UserError as error:
            raise type(error)(
                f"iteration {self.iteration + 1}: {error}; checkpoints up to the last one are intact in "
                f"{self._output_as_given / 'checkpoints'}"
            ) from error
