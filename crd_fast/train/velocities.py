"""What the policy, old and the reference predict for the micro-batches of an optimizer step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from crd_fast.models.base import FlowModel
from crd_fast.run.observer import Observer, observed
from crd_fast.schema import LossConfig
from crd_fast.train.chunk import Chunk
from crd_fast.train.forwards import autocast, chosen_prompts, doubled_velocity, unconditional
from crd_fast.weights.base import Weights

ROWS_IN_ONE = "forwards in one batch"  # the phase in which one forward's rows differ in their weights


@dataclass
class Velocities:
    """Predicts with each set of weights, for the prompts of one iteration.

    old_is_policy: old is not run, what the policy predicted is taken for it. some_without_policy: some pairs
    have no policy's term, and old is not run for those.
    """

    model: FlowModel  # predicts with whatever weights are active
    weights: Weights  # switches between them
    loss: LossConfig
    precision: str
    observer: Observer
    embeddings: dict[str, torch.Tensor]  # P prompts
    empty: dict[str, torch.Tensor]  # the empty prompt, first axis 1, or P negative prompts
    old_is_policy: bool
    some_without_policy: bool

    def predict(self, chunk: Chunk, branch: str = "policy") -> torch.Tensor:
        """(B, ...) predicted with the weights that are active, which are those of `branch`."""
        embeddings = chosen_prompts(self.embeddings, chunk.pairs.prompt, chunk.x.device)
        with autocast(chunk.x.device.type, self.precision), self.observer.branch(branch, len(chunk.pairs)):
            return self.model.velocity(chunk.x, chunk.pairs.sigma, embeddings)

    @observed("old")
    @torch.no_grad()
    def predict_old(self, chunks: list[Chunk]) -> None:
        """Fills the chunks' `old`, by a forward of the pairs that have a policy's term alone."""
        with self.weights.use("old"):
            for chunk in chunks:
                if not self.some_without_policy:
                    chunk.old = self.predict(chunk, "old")
                    continue
                rows = chunk.pairs.policy.nonzero().flatten()
                chunk.old = chunk.x  # stays where the term has no weight; measuring needs no old there
                if len(rows):
                    old = self.predict(chunk[rows], "old")
                    chunk.old = chunk.x.to(old.dtype).index_put((rows,), old)

    @observed("reference")
    @torch.no_grad()
    def predict_reference(self, chunks: list[Chunk]) -> None:
        """Fills the chunks' reference, by a forward of the pairs that are anchored alone."""
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
        embeddings = chosen_prompts(self.embeddings, chunk.pairs.prompt[rows], x.device)
        watched = partial(self.observer.branch, "reference")
        with autocast(chunk.x.device.type, self.precision):
            if self.loss.guidance_scale <= 1:
                with watched(len(x)):
                    ref_cond, ref_uncond = self.model.velocity(x, sigma, embeddings), None
            else:
                away = unconditional(self.empty, chunk.pairs.prompt[rows], x.device)
                ref_cond, ref_uncond = doubled_velocity(self.model, x, sigma, embeddings, away, watched)
        self._set_reference(chunk, rows, ref_cond, ref_uncond)

    @observed(ROWS_IN_ONE)
    @torch.no_grad()
    def predict_in_one_batch(self, chunk: Chunk, with_policy: bool = False) -> torch.Tensor | None:
        """Fills old and the reference by one forward, and returns what the policy predicts if asked to.

        With weights that are streamed it fetches each of them once.
        """
        names = ["policy"] * with_policy + ["old"] * (not self.old_is_policy)
        count = len(chunk.pairs)
        anchored = chunk.pairs.anchor.nonzero().flatten()
        if not self.loss.anchored:
            anchored = anchored[:0]
        guided = self.loss.guidance_scale > 1 and len(anchored)
        rows = torch.cat([torch.arange(count, device=anchored.device)] * len(names) + [anchored])
        if not len(rows):
            return None
        weights = [name for name in names for _ in range(count)] + ["reference"] * len(anchored)
        embeddings = chosen_prompts(self.embeddings, chunk.pairs.prompt[rows], chunk.x.device)
        if guided:
            rows, weights = torch.cat([rows, anchored]), weights + ["reference"] * len(anchored)
            away = unconditional(self.empty, chunk.pairs.prompt[anchored], chunk.x.device)
            embeddings = {
                key: torch.cat([value, away[key].to(value).expand(len(anchored), *value.shape[1:])])
                for key, value in embeddings.items()
            }
        with ExitStack() as within:
            within.enter_context(self.weights.use_rows(weights))
            within.enter_context(autocast(chunk.x.device.type, self.precision))
            for name in dict.fromkeys(weights):
                within.enter_context(self.observer.branch(name, weights.count(name)))
            predicted = self.model.velocity(chunk.x[rows], chunk.pairs.sigma[rows], embeddings)
        *parts, rest = predicted.split([count] * len(names) + [len(predicted) - count * len(names)])
        by_name = dict(zip(names, parts))
        chunk.old = by_name.get("old")
        if len(rest):
            rest = rest.clone()  # a view would hold the whole batch while the group is measured
            ref_cond, ref_uncond = rest.chunk(2) if guided else (rest, None)
            self._set_reference(chunk, anchored, ref_cond, ref_uncond)
        return by_name.get("policy")

    def _set_reference(self, chunk: Chunk, rows: torch.Tensor, ref_cond, ref_uncond) -> None:
        if len(rows) == len(chunk.pairs):
            chunk.ref_cond, chunk.ref_uncond = ref_cond, ref_uncond
            return
        # every pair needs some reference; where the anchor has no weight any finite one will do
        some = chunk.x.to(ref_cond.dtype)
        chunk.ref_cond = some.index_put((rows,), ref_cond)
        if ref_uncond is not None:
            chunk.ref_uncond = some.index_put((rows,), ref_uncond)
