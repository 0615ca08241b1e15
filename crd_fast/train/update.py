"""One optimizer step: measure, find coefficients, update, exact for a group of any size at any micro-batch.

The gradient of a sample depends on the rest of its group through scalars alone. So a group that does not
fit is measured without gradient in micro-batches, centered as B scalars, and then run again with gradient in
micro-batches. Where it fits, or where the graphs of its micro-batches are kept, measuring and updating share
one policy forward. Once all is measured, a part of the pairs can be drawn that goes backward for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial

import crd_kernels
import torch

from crd_fast.models.streaming import Pinned
from crd_fast.out_of_memory import as_out_of_memory
from crd_fast.run.observer import NOBODY, Observer, observed
from crd_fast.schema import LossConfig
from crd_fast.seeds import seeded_noise
from crd_fast.train.chunk import Chunk
from crd_fast.train.draws import drawn_in_groups
from crd_fast.train.forwards import autocast, chosen_prompts, doubled_velocity, unconditional
from crd_fast.train.kept import OnHost
from crd_fast.train.micro_batch import MicroBatch, release_memory
from crd_fast.train.norm_penalty import norm_penalty
from crd_fast.train.objectives import make_objective
from crd_fast.train.pairs import Pairs
from crd_fast.train.signal import Signal

ROWS_IN_ONE = "forwards in one batch"  # the phase in which one forward's rows differ in their weights


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

    def accumulate(
        self,
        pairs: Pairs,
        latents: torch.Tensor,  # (N, ...) clean latents of the iteration
        embeddings: dict[str, torch.Tensor],  # P prompts
        empty: dict[str, torch.Tensor],  # the empty prompt, first axis 1, or P negative prompts
    ) -> dict[str, float]:
        """Adds d loss / d parameters of the policy to `.grad`. Returns the step's losses and statistics.

        The observer advances by pairs. Where memory runs out, `.grad` is cleared and the step starts again
        with half the micro-batch.
        """
        self._latents, self._embeddings, self._empty = latents, embeddings, empty
        # found from the weights each time, never remembered: a resumed run decides as the one before did
        self._old_is_policy = not self.objective.needs_old or self.weights.is_policy("old")
        self._weighted = bool((pairs.policy != 1).any())
        self._denominator = denominator = len(pairs)
        if self._weighted:  # one stays at least, so that there are a gradient and statistics, if of zeros
            without_term = (pairs.policy == 0) & (pairs.anchor == 0)
            without_term[0] &= not without_term.all()
            pairs = pairs[~without_term]
        pairs = replace(pairs, together=self.objective.together(pairs)).to(latents.device)
        while True:
            try:
                return self._accumulate(pairs, denominator)
            except torch.OutOfMemoryError as error:
                self.micro_batch.halve(error)
            for parameter in self.weights.trained():
                parameter.grad = None
            release_memory()

    @as_out_of_memory()
    def _accumulate(self, pairs: Pairs, denominator: int) -> dict[str, float]:
        # of the penalty on norms, in every step, also where none of its pairs is anchored
        names = ("norm_loss", "norm_ratio") if self.loss.norm_penalty else ()
        self._beside: dict[str, torch.Tensor | float] = dict.fromkeys(names, 0.0)
        self._sizes: list[torch.Tensor] = []  # of the pairs' gradients, for the signal
        size = self.micro_batch.size
        measured = []
        for unit in self._units(pairs):
            chunks = [self._prepare(unit[i : i + size]) for i in range(0, len(unit), size)]
            measured += self._update(unit, chunks, denominator)
        if self.signal is not None:  # now that memory sufficed for all of it
            self.signal.see(pairs.step, torch.cat(self._sizes))
        stats = crd_kernels.Stats.cat(part for part, _ in measured)
        means = self.objective.metrics(stats, pairs) | {"kl": stats.kl.double() * pairs.anchor.double()}
        if self.objective.needs_old:
            means["old_kl"] = stats.old_kl.double() * pairs.anchor.double() * (pairs.policy != 0)
        found = {name: value.sum() / denominator for name, value in means.items()} | {
            "policy_loss": sum(losses.policy_loss.double() for _, losses in measured),
            "kl_loss": sum(losses.kl_loss.double() for _, losses in measured),
        }
        return {name: float(value) for name, value in (found | self._beside).items()}

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
        self, unit: Pairs, chunks: list[Chunk], denominator: int
    ) -> list[tuple[crd_kernels.Stats, crd_kernels.Coefficients]]:
        """One set of weights after the other, each for all chunks: to switch may mean to copy them all."""
        if not self.one_pass:
            if not self._old_is_policy:
                self._old(chunks)
            self._reference(chunks)
        if self.backward_fraction < 1 or (
            self.objective.coupled and len(chunks) > 1 and self.kept_graphs == "none"
        ):
            return [self._measured_first(unit, chunks, denominator)]
        if self.objective.coupled:
            return [self._at_once(unit, chunks, denominator)]
        return [self._at_once(chunk.pairs, [chunk], denominator) for chunk in chunks]

    def _at_once(
        self, pairs: Pairs, chunks: list[Chunk], denominator: int
    ) -> tuple[crd_kernels.Stats, crd_kernels.Coefficients]:
        """Forwards with gradient; their graphs are held until all are measured."""
        policies, parts = [], []
        on_host, pinned = self.kept_graphs == "host" and len(chunks) > 1, Pinned()
        for chunk in chunks:
            if self.one_pass:
                self._rows(chunk, policy=False)
            with OnHost(self.model.transformer, pinned) if on_host else nullcontext():
                policies.append(self._velocity(chunk))
            parts.append(self._measure(chunk, policies[-1].detach()))
            if self.objective.coupled:  # its gradient does not need old
                chunk.old = None
        stats = crd_kernels.Stats.cat(parts)
        coefficients = self._coefficients(stats, pairs, denominator)
        start = 0
        for chunk in chunks:
            stop = start + len(chunk)
            self._backward(chunk, policies.pop(0), coefficients[start:stop])
            chunk.forget()
            self.observer.advance(len(chunk))
            start = stop
        return stats, coefficients

    def _measured_first(
        self, unit: Pairs, chunks: list[Chunk], denominator: int
    ) -> tuple[crd_kernels.Stats, crd_kernels.Coefficients]:
        """Forwards without gradient, and then with gradient for all pairs or for those that are drawn."""
        parts = []
        for chunk in chunks:
            with torch.no_grad():
                policy = self._rows(chunk, policy=True) if self.one_pass else self._velocity(chunk)
                parts.append(self._measure(chunk, policy))
            if self.objective.coupled:
                chunk.old = None
        stats = crd_kernels.Stats.cat(parts)
        coefficients = losses = self._coefficients(stats, unit, denominator)
        if self.backward_fraction < 1:
            chunks, coefficients = self._drawn(stats, coefficients, unit, chunks)
        start = 0
        for chunk in chunks:
            stop = start + len(chunk)
            self._backward(chunk, self._velocity(chunk), coefficients[start:stop])
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

    def _prepare(self, pairs: Pairs) -> Chunk:
        x0 = self._latents[pairs.sample]
        noise = seeded_noise(pairs.seed, x0.shape[1:], x0.device)
        x = torch.lerp(x0, noise, pairs.sigma.view(-1, *[1] * (x0.ndim - 1)))
        return Chunk(pairs, x0, noise, x)

    @observed("old")
    @torch.no_grad()
    def _old(self, chunks: list[Chunk]) -> None:
        """Predictions of old, only for the pairs with a policy's term."""
        with self.weights.use("old"):
            for chunk in chunks:
                if not self._weighted:
                    chunk.old = self._velocity(chunk, "old")
                    continue
                rows = chunk.pairs.policy.nonzero().flatten()
                chunk.old = chunk.x  # where the term has no weight `_measure` puts the policy's prediction
                if len(rows):
                    old = self._velocity(chunk[rows], "old")
                    chunk.old = chunk.x.to(old.dtype).index_put((rows,), old)

    @observed("reference")
    @torch.no_grad()
    def _reference(self, chunks: list[Chunk]) -> None:
        """Predictions of the reference, only for the pairs that are anchored."""
        anchored = [chunk.pairs.anchor.nonzero().flatten() for chunk in chunks]
        if self.weights.sharded:  # at least one pair, whose anchor may have no weight
            anchored = [rows if len(rows) else rows.new_zeros(1) for rows in anchored]
        if not self.loss.anchored or not any(map(len, anchored)):
            return
        with self.weights.use("reference"):
            for chunk, rows in zip(chunks, anchored):
                if len(rows):
                    self._reference_of(chunk, rows)

    def _reference_of(self, chunk: Chunk, rows: torch.Tensor) -> None:
        x, sigma = chunk.x[rows], chunk.pairs.sigma[rows]
        embeddings = chosen_prompts(self._embeddings, chunk.pairs.prompt[rows], x.device)
        watched = partial(self.observer.branch, "reference")
        with self._autocast(chunk):
            if self.loss.guidance_scale <= 1:
                with watched(len(x)):
                    ref_cond, ref_uncond = self.model.velocity(x, sigma, embeddings), None
            else:
                away = unconditional(self._empty, chunk.pairs.prompt[rows], x.device)
                ref_cond, ref_uncond = doubled_velocity(self.model, x, sigma, embeddings, away, watched)
        self._set_reference(chunk, rows, ref_cond, ref_uncond)

    @observed(ROWS_IN_ONE)
    @torch.no_grad()
    def _rows(self, chunk: Chunk, policy: bool) -> torch.Tensor | None:
        """The predictions of old and of the reference, and those that it returns if asked, in one batch."""
        names = ["policy"] * policy + ["old"] * (not self._old_is_policy)
        count = len(chunk.pairs)
        anchored = chunk.pairs.anchor.nonzero().flatten()
        if not self.loss.anchored:
            anchored = anchored[:0]
        guided = self.loss.guidance_scale > 1 and len(anchored)
        rows = torch.cat([torch.arange(count, device=anchored.device)] * len(names) + [anchored])
        if not len(rows):
            return None
        weights = [name for name in names for _ in range(count)] + ["reference"] * len(anchored)
        embeddings = chosen_prompts(self._embeddings, chunk.pairs.prompt[rows], chunk.x.device)
        if guided:
            rows, weights = torch.cat([rows, anchored]), weights + ["reference"] * len(anchored)
            away = unconditional(self._empty, chunk.pairs.prompt[anchored], chunk.x.device)
            embeddings = {
                key: torch.cat([value, away[key].to(value).expand(len(anchored), *value.shape[1:])])
                for key, value in embeddings.items()
            }
        with self.weights.use_rows(weights), self._autocast(chunk), ExitStack() as branches:
            for name in dict.fromkeys(weights):
                branches.enter_context(self.observer.branch(name, weights.count(name)))
            predicted = self.model.velocity(chunk.x[rows], chunk.pairs.sigma[rows], embeddings)
        *parts, rest = predicted.split([count] * len(names) + [len(predicted) - count * len(names)])
        found = dict(zip(names, parts))
        chunk.old = found.get("old")
        if len(rest):
            rest = rest.clone()  # a view would hold the whole batch while the group is measured
            ref_cond, ref_uncond = rest.chunk(2) if guided else (rest, None)
            self._set_reference(chunk, anchored, ref_cond, ref_uncond)
        return found.get("policy")

    def _set_reference(self, chunk: Chunk, rows: torch.Tensor, ref_cond, ref_uncond) -> None:
        if len(rows) == len(chunk.pairs):
            chunk.ref_cond, chunk.ref_uncond = ref_cond, ref_uncond
            return
        # every pair needs some reference; where the anchor has no weight any finite one will do
        some = chunk.x.to(ref_cond.dtype)
        chunk.ref_cond = some.index_put((rows,), ref_cond)
        if ref_uncond is not None:
            chunk.ref_uncond = some.index_put((rows,), ref_uncond)

    def _velocity(self, chunk: Chunk, branch: str = "policy") -> torch.Tensor:
        """By the weights that are active, which are those of `branch`."""
        embeddings = chosen_prompts(self._embeddings, chunk.pairs.prompt, chunk.x.device)
        with self._autocast(chunk), self.observer.branch(branch, len(chunk.pairs)):
            return self.model.velocity(chunk.x, chunk.pairs.sigma, embeddings)

    @observed("measure")
    def _measure(self, chunk: Chunk, policy: torch.Tensor) -> crd_kernels.Stats:
        old = policy if self._old_is_policy else chunk.old
        assert old is not None  # `_old` or `_rows` came before
        if self._weighted and not self._old_is_policy:  # a pair without the term has an implicit reward of 0
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
    def _coefficients(
        self, stats: crd_kernels.Stats, pairs: Pairs, denominator: int
    ) -> crd_kernels.Coefficients:
        found = self.objective.coefficients(stats, pairs, denominator)
        if self.signal is not None:
            self._sizes.append(found.c1.abs() * stats.policy_error.sqrt())
        return self.objective.weighted(found, stats, pairs, denominator) if self._weighted else found

    @observed("backward")
    def _backward(self, chunk: Chunk, policy: torch.Tensor, coefficients: crd_kernels.Coefficients) -> None:
        fixed = policy.detach()
        gradient = crd_kernels.velocity_grad(
            fixed,
            chunk.ref_cond,
            chunk.x0,
            chunk.noise,
            coefficients,
            old=fixed if self._old_is_policy else chunk.old,
            ref_uncond=chunk.ref_uncond,
            guidance_scale=self.loss.guidance_scale,
            impl=self.loss.impl,
        )
        if self.loss.norm_penalty and chunk.ref_cond is not None:
            gradient += self._norm_gradient(fixed, chunk)
        policy.backward(gradient)

    def _norm_gradient(self, policy: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        assert chunk.ref_cond is not None
        share = chunk.pairs.anchor / self._denominator
        gradient, terms, ratio = norm_penalty(policy, chunk.ref_cond, self.loss.norm_penalty * share)
        for name, value in {"norm_loss": terms.sum(), "norm_ratio": (share * ratio).sum()}.items():
            self._beside[name] = self._beside[name] + value
        return gradient

    def _autocast(self, chunk: Chunk):
        return autocast(chunk.x.device.type, self.precision)
