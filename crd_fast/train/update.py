"""One optimizer step: measure, find coefficients, update, exact for a group of any size at any micro-batch.

The gradient of a sample depends on the rest of its group through scalars alone. So a group that does not
fit is measured without gradient in micro-batches, centered as B scalars, and then run again with gradient in
micro-batches. Where it fits, or where the graphs of its micro-batches are kept, measuring and updating share
one policy forward. Once all is measured, a part of the pairs can be drawn that goes backward for all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import crd_kernels
import torch

from crd_fast.config import Recipe
from crd_fast.models.streaming import Pinned
from crd_fast.out_of_memory import ON_THE_HOST, as_out_of_memory
from crd_fast.run.observer import NOBODY, Observer, observed
from crd_fast.schema import LossConfig
from crd_fast.seeds import seeded_noise
from crd_fast.train.chunk import Chunk
from crd_fast.train.draws import drawn_in_groups
from crd_fast.train.kept import OnHost
from crd_fast.train.micro_batch import MicroBatch, release_memory, resolve_micro_batch
from crd_fast.train.norm_penalty import norm_penalty
from crd_fast.train.objectives import make_objective
from crd_fast.train.pairs import Pairs
from crd_fast.train.signal import Signal
from crd_fast.train.velocities import Velocities

logger = logging.getLogger("crd_fast")


@dataclass
class _Step:
    """One optimizer step, tried with one size of the micro-batch."""

    latents: torch.Tensor
    velocities: Velocities
    denominator: int  # the pairs of the step, also those that are left out
    gradient_sizes: list[torch.Tensor] = field(default_factory=list)  # of the pairs, for the signal
    norm_metrics: dict[str, torch.Tensor | float] = field(default_factory=dict)  # of the penalty on norms


class Updater:
    """Accumulates the gradient of one optimizer step over all its pairs, by the method of `loss`.

    model: predicts velocities with whatever weights are active; weights: switches between them. one_pass:
    what is predicted without gradient for a micro-batch goes through the network as one batch, whose rows
    differ in their weights, so that weights that are streamed are fetched once. backward_fraction,
    kept_graphs: as the recipe has them. signal: is shown the size of every pair's gradient.

    While old is equal to the policy it is not run: what the policy predicted is taken for it. An implicit
    reward of exactly 0 follows from that alone. It does not follow from equal weights: which rounding a row
    comes out with depends on the shape of its batch and its place there, on whether autograd records, on what
    a compiler fused.
    """

    def __init__(
        self,
        model,
        weights,
        loss: LossConfig,
        *,
        advantage_clip: float,
        precision: str,
        micro_batch: MicroBatch | int,
        one_pass: bool = False,
        backward_fraction: float = 1.0,
        kept_graphs: str = "none",
        signal: Signal | None = None,
        observer: Observer = NOBODY,
    ):
        self.model, self.weights, self.loss = model, weights, loss
        self.objective, self.precision = make_objective(loss, advantage_clip), precision
        self.one_pass, self.observer = one_pass, observer
        self.backward_fraction, self.kept_graphs, self.signal = backward_fraction, kept_graphs, signal
        self.micro_batch = MicroBatch(micro_batch) if isinstance(micro_batch, int) else micro_batch

    @classmethod
    def of(cls, recipe: Recipe, model, weights, signal: Signal | None, observer: Observer) -> Updater:
        """As the recipe trains in its sections `loss` and `train`."""
        config = recipe.train
        return cls(
            model,
            weights,
            recipe.loss,
            advantage_clip=recipe.advantage.clip,
            precision=config.precision,
            micro_batch=resolve_micro_batch(config.micro_batch, fixed=weights.sharded),
            one_pass=recipe.model.streaming,
            backward_fraction=config.backward_fraction,
            kept_graphs=config.kept_graphs,
            signal=signal,
            observer=observer,
        )

    def accumulate(
        self,
        pairs: Pairs,
        latents: torch.Tensor,  # (N, ...) clean latents of the iteration
        embeddings: dict[str, torch.Tensor],  # P prompts
        empty: dict[str, torch.Tensor],  # the empty prompt, first axis 1, or P negative prompts
    ) -> dict[str, float]:
        """Adds d loss / d parameters of the policy to `.grad`. Returns the step's losses and statistics.

        The observer advances by pairs. Where memory runs out, `.grad` is cleared and the step starts again
        with half the micro-batch, or without keeping graphs.
        """
        # found from the weights each time, never remembered: a resumed run decides as the one before did
        old_is_policy = not self.objective.needs_old or self.weights.is_policy("old")
        weighted = bool((pairs.policy != 1).any())
        velocities = Velocities(
            self.model,
            self.weights,
            self.loss,
            self.precision,
            self.observer,
            embeddings,
            empty,
            old_is_policy,
            some_without_policy=weighted,
        )
        denominator = len(pairs)
        if weighted:  # one stays at least, so that there are a gradient and statistics, if of zeros
            without_term = (pairs.policy == 0) & (pairs.anchor == 0)
            without_term[0] &= not without_term.all()
            pairs = pairs[~without_term]
        pairs = replace(pairs, together=self.objective.together(pairs)).to(latents.device)
        while True:
            try:
                return self._accumulate(_Step(latents, velocities, denominator), pairs)
            except torch.OutOfMemoryError as error:
                self._take_less(pairs, error)
            for parameter in self.weights.trained():
                parameter.grad = None
            release_memory()

    def _take_less(self, pairs: Pairs, error: torch.OutOfMemoryError) -> None:
        """Keeps no graphs from now on, if they may be what there is no memory for; else half the micro-batch.

        Graphs on the device are as large in smaller micro-batches. Raises UserError as `MicroBatch.halve`.
        """
        size, sizes = self.micro_batch.size, torch.unique_consecutive(pairs.together, return_counts=True)[1]
        keeps = self.kept_graphs != "none" and self.objective.coupled and self.backward_fraction == 1
        suspected = self.kept_graphs == "device" or size == 1 or ON_THE_HOST in str(error)
        if keeps and suspected and int(sizes.max()) > size and not self.micro_batch.fixed:
            logger.warning(
                "warning: out of memory with train.kept_graphs %s, going on without", self.kept_graphs
            )
            self.kept_graphs = "none"
        else:
            self.micro_batch.halve(error)

    @as_out_of_memory()
    def _accumulate(self, step: _Step, pairs: Pairs) -> dict[str, float]:
        if self.loss.norm_penalty:  # in every step, also where none of its pairs is anchored
            step.norm_metrics = {"norm_loss": 0.0, "norm_ratio": 0.0}
        size = self.micro_batch.size
        measured = []
        for unit in self._units(pairs):
            chunks = [self._prepare(step, unit[i : i + size]) for i in range(0, len(unit), size)]
            measured += self._update(step, unit, chunks)
        if self.signal is not None:  # now that memory sufficed for all of it
            self.signal.see(pairs.step, torch.cat(step.gradient_sizes))
        stats = crd_kernels.Stats.cat(part for part, _ in measured)
        means = self.objective.metrics(stats, pairs) | {"kl": stats.kl.double() * pairs.anchor.double()}
        if self.objective.needs_old:
            means["old_kl"] = stats.old_kl.double() * pairs.anchor.double() * (pairs.policy != 0)
        metrics = {name: value.sum() / step.denominator for name, value in means.items()} | {
            "policy_loss": sum(losses.policy_loss.double() for _, losses in measured),
            "kl_loss": sum(losses.kl_loss.double() for _, losses in measured),
        }
        return {name: float(value) for name, value in (metrics | step.norm_metrics).items()}

    def _units(self, pairs: Pairs) -> Iterator[Pairs]:
        """Whole runs of what belongs together: as many as fit a micro-batch, at least one."""
        _, sizes = torch.unique_consecutive(pairs.together, return_counts=True)
        start = stop = 0
        for size in sizes.tolist():
            if stop > start and stop + size - start > self.micro_batch.size:
                yield pairs[start:stop]
                start = stop
            stop += size
        yield pairs[start:stop]

    def _update(
        self, step: _Step, unit: Pairs, chunks: list[Chunk]
    ) -> list[tuple[crd_kernels.Stats, crd_kernels.Coefficients]]:
        """One set of weights after the other, each for all chunks: to switch may mean to copy them all."""
        if not self.one_pass:
            if not step.velocities.old_is_policy:
                step.velocities.predict_old(chunks)
            step.velocities.predict_reference(chunks)
        if self.backward_fraction < 1 or (
            self.objective.coupled and len(chunks) > 1 and self.kept_graphs == "none"
        ):
            return [self._measured_first(step, unit, chunks)]
        if self.objective.coupled:
            return [self._at_once(step, unit, chunks)]
        return [self._at_once(step, chunk.pairs, [chunk]) for chunk in chunks]

    def _at_once(
        self, step: _Step, pairs: Pairs, chunks: list[Chunk]
    ) -> tuple[crd_kernels.Stats, crd_kernels.Coefficients]:
        """Forwards with gradient; their graphs are held until all are measured."""
        policies, parts = [], []
        on_host, pinned = self.kept_graphs == "host" and len(chunks) > 1, Pinned()
        for chunk in chunks:
            if self.one_pass:
                step.velocities.predict_in_one_batch(chunk)
            with OnHost(self.model.transformer, pinned) if on_host else nullcontext():
                policies.append(step.velocities.predict(chunk))
            parts.append(self._measure(step, chunk, policies[-1].detach()))
            if self.objective.coupled:  # its gradient does not need old
                chunk.old = None
        stats = crd_kernels.Stats.cat(parts)
        coefficients = self._coefficients(step, stats, pairs)
        start = 0
        for chunk in chunks:
            stop = start + len(chunk)
            self._backward(step, chunk, policies.pop(0), coefficients[start:stop])
            chunk.forget()
            self.observer.advance(len(chunk))
            start = stop
        return stats, coefficients

    def _measured_first(
        self, step: _Step, unit: Pairs, chunks: list[Chunk]
    ) -> tuple[crd_kernels.Stats, crd_kernels.Coefficients]:
        """Forwards without gradient, and then with gradient for all pairs or for those that are drawn."""
        parts = []
        for chunk in chunks:
            with torch.no_grad():
                if self.one_pass:
                    policy = step.velocities.predict_in_one_batch(chunk, with_policy=True)
                else:
                    policy = step.velocities.predict(chunk)
                parts.append(self._measure(step, chunk, policy))
            if self.objective.coupled:
                chunk.old = None
        stats = crd_kernels.Stats.cat(parts)
        coefficients = losses = self._coefficients(step, stats, unit)
        if self.backward_fraction < 1:
            chunks, coefficients = self._drawn(stats, coefficients, unit, chunks)
        start = 0
        for chunk in chunks:
            stop = start + len(chunk)
            self._backward(step, chunk, step.velocities.predict(chunk), coefficients[start:stop])
            chunk.forget()
            start = stop
        self.observer.advance(len(unit))
        return stats, losses

    def _drawn(
        self,
        stats: crd_kernels.Stats,
        coefficients: crd_kernels.Coefficients,
        unit: Pairs,
        chunks: list[Chunk],
    ) -> tuple[list[Chunk], crd_kernels.Coefficients]:
        """A part of each group, drawn by what its gradients are at most, weighted by 1 / probability."""
        size = coefficients.c1.abs() * stats.policy_error.sqrt() + coefficients.c2.abs() * stats.kl.sqrt()
        if coefficients.c3 is not None:
            size = size + coefficients.c3.abs() * stats.old_deviation.sqrt()
        weight = torch.from_numpy(
            drawn_in_groups(
                size.double().cpu().numpy(),
                unit.group.cpu().numpy(),
                unit.offset.cpu().numpy(),
                self.backward_fraction,
            )
        )
        drawn = weight.nonzero().flatten()
        if not len(drawn):  # none has a gradient; one goes backward, so that there is one, of zeros
            drawn = torch.zeros(1, dtype=torch.int64)
        chosen = coefficients[drawn.to(size.device)]
        factor = weight[drawn].to(chosen.c1)
        chosen = replace(chosen, c1=chosen.c1 * factor, c2=chosen.c2 * factor)
        if chosen.c3 is not None:
            chosen = replace(chosen, c3=chosen.c3 * factor)
        parts, start = [], 0
        for chunk in chunks:
            of_chunk = drawn[(drawn >= start) & (drawn < start + len(chunk))] - start
            parts.append(chunk[of_chunk.to(chunk.x.device)])
            start += len(chunk)
            chunk.forget()
        return Chunk.joined(parts).split(self.micro_batch.size), chosen

    def _prepare(self, step: _Step, pairs: Pairs) -> Chunk:
        x0 = step.latents[pairs.sample]
        noise = seeded_noise(pairs.seed, x0.shape[1:], x0.device)
        x = torch.lerp(x0, noise, pairs.sigma.view(-1, *[1] * (x0.ndim - 1)))
        return Chunk(pairs, x0, noise, x)

    @observed("measure")
    def _measure(self, step: _Step, chunk: Chunk, policy: torch.Tensor) -> crd_kernels.Stats:
        velocities = step.velocities
        old = policy if velocities.old_is_policy else chunk.old
        assert old is not None  # it was predicted before
        if velocities.some_without_policy and not velocities.old_is_policy:
            # a pair without the term has an implicit reward of 0
            rows = (chunk.pairs.policy == 0).nonzero().flatten()
            old = old.index_copy(0, rows, policy[rows].to(old.dtype))
        return crd_kernels.measure(
            policy,
            old,
            chunk.ref_cond,
            chunk.x0,
            chunk.noise,
            ref_uncond=chunk.ref_uncond,
            guidance_scale=self.loss.guidance_scale,
            adaptive_weighting=self.objective.adaptive_weighting,
            mix=self.objective.mix,
            impl=self.loss.impl,
        )

    @observed("center")
    def _coefficients(self, step: _Step, stats: crd_kernels.Stats, pairs: Pairs) -> crd_kernels.Coefficients:
        coefficients = self.objective.coefficients(stats, pairs, step.denominator)
        if self.signal is not None:
            step.gradient_sizes.append(coefficients.c1.abs() * stats.policy_error.sqrt())
        if not step.velocities.some_without_policy:
            return coefficients
        return self.objective.weighted(coefficients, stats, pairs, step.denominator)

    @observed("backward")
    def _backward(
        self, step: _Step, chunk: Chunk, policy: torch.Tensor, coefficients: crd_kernels.Coefficients
    ) -> None:
        fixed = policy.detach()
        gradient = crd_kernels.velocity_grad(
            fixed,
            chunk.ref_cond,
            chunk.x0,
            chunk.noise,
            coefficients,
            old=fixed if step.velocities.old_is_policy else chunk.old,
            ref_uncond=chunk.ref_uncond,
            guidance_scale=self.loss.guidance_scale,
            impl=self.loss.impl,
        )
        if self.loss.norm_penalty and chunk.ref_cond is not None:
            gradient += self._norm_gradient(step, fixed, chunk)
        policy.backward(gradient)

    def _norm_gradient(self, step: _Step, policy: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        assert chunk.ref_cond is not None
        share = chunk.pairs.anchor / step.denominator
        gradient, terms, ratio = norm_penalty(policy, chunk.ref_cond, self.loss.norm_penalty * share)
        for name, value in {"norm_loss": terms.sum(), "norm_ratio": (share * ratio).sum()}.items():
            step.norm_metrics[name] = step.norm_metrics[name] + value
        return gradient
