"""Methods: from what was measured of pairs, and their advantages, to the coefficients of their gradients.

The updater does the rest, the same for all: forwards, micro-batches, the anchor. A method is a class here and
a name in `OBJECTIVES` and in `loss.method`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import crd_kernels
import numpy as np
import torch
from torch.nn.functional import softplus

from crd_fast.schema import LossConfig
from crd_fast.train.pairs import Pairs


class Objective(ABC):
    """One method with its settings.

    coupled: a pair's coefficients depend on the others that are measured with it, so all of them must be
    measured before one of them goes backward. needs_old: the predictions of old matter. adaptive_weighting,
    mix: what `crd_kernels.measure` is given.
    """

    coupled = False
    needs_old = True
    adaptive_weighting = False
    mix = 0.0

    def __init__(self, loss: LossConfig, advantage_clip: float):
        self.loss, self.advantage_clip = loss, advantage_clip

    def together(self, pairs: Pairs) -> torch.Tensor:
        """(B,) ids, in runs, of the pairs that `coefficients` has to see at once where it is coupled."""
        return pairs.group

    @abstractmethod
    def coefficients(
        self, stats: crd_kernels.Stats, pairs: Pairs, denominator: int
    ) -> crd_kernels.Coefficients:
        """c1, c2 and where needed c3, (B,), and the losses: sums over these pairs, through `denominator`."""

    def weighted(
        self, coefficients: crd_kernels.Coefficients, stats: crd_kernels.Stats, pairs: Pairs, denominator: int
    ) -> crd_kernels.Coefficients:
        """The coefficients times the pairs' own weights of the policy's term. The policy loss is that of the
        pairs with such a term alone, without their weights."""
        weight = pairs.policy.to(coefficients.c1.dtype)
        c3 = None if coefficients.c3 is None else coefficients.c3 * weight
        coefficients = replace(coefficients, c1=coefficients.c1 * weight, c3=c3)
        rows = weight.nonzero().flatten()
        if len(rows) == len(pairs):
            return coefficients
        loss = torch.zeros_like(coefficients.policy_loss)
        if len(rows):
            loss = self.coefficients(stats[rows], pairs[rows], denominator).policy_loss
        return replace(coefficients, loss=loss + coefficients.kl_loss, policy_loss=loss)

    def anchor_strength(self, advantage: np.ndarray) -> np.ndarray:
        """What multiplies the distance to the reference for each advantage A_i, in float64."""
        return np.full(advantage.shape, self.loss.kl_beta)

    def metrics(self, stats: crd_kernels.Stats, pairs: Pairs) -> dict[str, torch.Tensor]:
        """Metrics of each pair, (B,) float64, beside the losses and the distances to the reference."""
        return {"old_deviation": stats.old_deviation.double()} if self.needs_old else {}


class CRD(Objective):
    """Centered reward distillation: the regression of centered log-ratios on centered rewards."""

    def __init__(self, loss: LossConfig, advantage_clip: float):
        super().__init__(loss, advantage_clip)
        self.adaptive_weighting, self.coupled = loss.adaptive_weighting, loss.centering != "none"

    def together(self, pairs):
        if self.loss.centering != "batch":
            return pairs.group
        size = self.loss.centering_batch or len(pairs)
        return torch.arange(len(pairs), device=pairs.group.device) // size

    def coefficients(self, stats, pairs, denominator):
        return crd_kernels.center(
            stats,
            pairs.advantage,
            pairs.together,
            beta=self.loss.beta,
            kl_beta=self.loss.kl_beta,
            kl_min=min(self.loss.kl_min, self.loss.kl_beta),
            reward_adaptive_kl=self.loss.reward_adaptive_kl,
            loss_type=self.loss.type,
            temperature=self.loss.temperature,
            centering="none" if self.loss.centering == "none" else "prompt",
            advantage_clip=self.advantage_clip,
            kl_weight=pairs.anchor,
            denominator=denominator,
            impl=self.loss.impl,
        )

    def anchor_strength(self, advantage):
        if not self.loss.reward_adaptive_kl:
            return super().anchor_strength(advantage)
        least = min(self.loss.kl_min, self.loss.kl_beta)
        return least + to_unit(advantage, self.advantage_clip) * (self.loss.kl_beta - least)

    def metrics(self, stats, pairs):
        implicit = self.loss.beta * stats.implicit_reward.double()
        external = to_unit(pairs.advantage.double(), self.advantage_clip)
        return {
            **log_ratio(stats),
            "implicit_variance": deviation(implicit, pairs.group).square(),
            "external_variance": deviation(external, pairs.group).square(),
            **super().metrics(stats, pairs),
        }


class NFT(Objective):
    """DiffusionNFT: a positive and a negative branch around old, weighed by the reward."""

    def __init__(self, loss: LossConfig, advantage_clip: float):
        super().__init__(loss, advantage_clip)
        self.adaptive_weighting, self.mix = loss.adaptive_weighting, loss.beta

    def coefficients(self, stats, pairs, denominator):
        return crd_kernels.nft_coefficients(
            stats,
            pairs.advantage,
            pairs.sigma,
            beta=self.loss.beta,
            kl_beta=self.loss.kl_beta,
            advantage_clip=self.advantage_clip,
            adaptive_weighting=self.adaptive_weighting,
            kl_weight=pairs.anchor,
            denominator=denominator,
            impl=self.loss.impl,
        )


class AWM(Objective):
    """Advantage-weighted matching; with `clip_range`, by the clipped ratio to old."""

    def __init__(self, loss: LossConfig, advantage_clip: float):
        super().__init__(loss, advantage_clip)
        self.off_policy = loss.clip_range is not None
        self.needs_old = self.off_policy or loss.old_kl_beta > 0

    def coefficients(self, stats, pairs, denominator):
        return self.matched(stats, pairs, denominator, pairs.advantage, self.advantage_clip)

    def matched(self, stats, pairs, denominator, weight, clip):
        return crd_kernels.awm_coefficients(
            stats,
            weight,
            off_policy=self.off_policy,
            clip_range=self.loss.clip_range,
            ema_kl_beta=self.loss.old_kl_beta,
            sigma=pairs.sigma,
            weighting=self.loss.weighting,
            kl_beta=self.loss.kl_beta,
            advantage_clip=clip,
            kl_weight=pairs.anchor,
            denominator=denominator,
            impl=self.loss.impl,
        )

    def metrics(self, stats, pairs):
        return (log_ratio(stats) if self.off_policy else {}) | super().metrics(stats, pairs)


class FlowMatching(AWM):
    """Flow matching on the samples, weighed by their rewards: by a_i, the advantage mapped to [0, 1], or by 0
    where no reward scored the sample."""

    def coefficients(self, stats, pairs, denominator):
        weight = to_unit(pairs.advantage, self.advantage_clip) * pairs.scored
        return self.matched(stats, pairs, denominator, weight, 1.0)


class DPO(Objective):
    """Online diffusion DPO: within each group the i-th best sample against the i-th worst, relative to old.

    With e(v) = mean((v - target)^2) and g_j = e(policy_j) - e(old_j):

        policy_loss = mean over pairs of -log sigmoid(-beta / 2 (g_preferred - g_rejected))

    with 0 for pairs of one reward. K samples are K / 2 pairs of the mean; the middle one of an odd K has no
    other. What no reward scored is in no pair.
    Source: Wallace et al., arXiv 2311.12908, where the reference is the pretrained model, as it is here with
    `snapshots.old: 0/1/0/1`, and both of a pair have one noise; here each sample has its own. The public
    trainer that Flow-GRPO (arXiv 2505.05470) compares with takes a prompt's best and worst, at beta 100.
    """

    coupled = True

    def coefficients(self, stats, pairs, denominator):
        advantage, mate = pairs.advantage.double(), mates(pairs.advantage, runs(pairs.group), pairs.scored)
        gap = stats.policy_error.double() - stats.old_error.double()
        sign = (advantage - advantage[mate]).sign()  # 1 preferred, -1 rejected, 0 neither
        logit = -self.loss.beta / 2 * sign * (gap - gap[mate])
        policy_loss = (softplus(-logit) * (sign > 0)).sum() * 2 / denominator
        step = 2 / stats.elements.double() / denominator
        strength = self.loss.kl_beta * pairs.anchor.double()
        kl_loss = (strength * stats.kl.double()).sum() / denominator
        c1 = step * self.loss.beta * sign * (-logit).sigmoid()
        c1, c2 = c1.to(stats.table.dtype), (step * strength * stats.anchored).to(stats.table.dtype)
        return crd_kernels.Coefficients(policy_loss + kl_loss, policy_loss, kl_loss, c1, c2)


OBJECTIVES: dict[str, Callable[[LossConfig, float], Objective]] = {
    "crd": CRD,
    "nft": NFT,
    "awm": AWM,
    "flow_matching": FlowMatching,
    "dpo": DPO,
}


def make_objective(loss: LossConfig, advantage_clip: float) -> Objective:
    """The method that the recipe names."""
    return OBJECTIVES[loss.method](loss, advantage_clip)


def to_unit(advantage, clip: float):
    """a_i, the advantage mapped to [0, 1]: 1/2 where it is 0. Of a tensor or an array, of its shape."""
    return (advantage.clip(-clip, clip) / (2 * clip) + 0.5).clip(0, 1)


def log_ratio(stats: crd_kernels.Stats) -> dict[str, torch.Tensor]:
    reward = stats.implicit_reward.double()
    return {"implicit_reward_mean": reward, "implicit_reward_abs": reward.abs()}


def runs(group: torch.Tensor) -> torch.Tensor:
    """The number, from 0 on, of each pair's run of equal `group` ids, (B,); the host does not wait for it."""
    run = torch.zeros_like(group)
    run[1:] = (group[1:] != group[:-1]).cumsum(0)
    return run


def mates(value: torch.Tensor, group: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """(B,) indices: the mate of a group's i-th largest value is the group's i-th smallest.

    Counted among the scored pairs. The mate of a pair that is not scored is itself, or another such pair.
    """
    part = 2 * group + scored.long()
    order = value.argsort(stable=True)
    order = order[part[order].argsort(stable=True)]  # ascending within each part, the parts in their order
    part = part[order]
    place = torch.arange(len(part), device=part.device)
    first = torch.searchsorted(part, part)
    last = torch.searchsorted(part, part, right=True) - 1
    return torch.empty_like(order).scatter_(0, order, order[first + last - place])


def deviation(value: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(B,) value minus the mean over its run of equal `group` ids; the host does not wait for it."""
    run = runs(group)
    total = torch.zeros_like(value).index_add_(0, run, value)
    count = torch.zeros_like(value).index_add_(0, run, torch.ones_like(value))
    return value - (total / count)[run]
