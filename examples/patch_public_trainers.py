"""Our losses inside the two public trainers that people have, given their tensors and their names.

Flow-Factory's CRD trainer: call `patch_flow_factory` once before training.

    from flow_factory.trainers.rl.crd import CRDTrainer
    patch_flow_factory(CRDTrainer)

It replaces the per-sample reward, where that trainer spends its loss time and memory (float64 copies of every
latent); its centering and its KL stay. Two things that it does by itself stay too: it centers over whatever
shares a micro-batch, so keep whole groups in one.

DiffusionNFT's training script: its loss is written inline, from `positive_prediction = ...` to
`scaled_loss = ...`; replace those lines by one call of `diffusion_nft_loss`.
"""

import torch
from crd_kernels import implicit_reward, nft_loss

# What takes an adapter's means over latents. Newer versions let the last two be overridden, older the others.
REDUCTIONS = (
    "reduce_latent_values",
    "reduce_component_latent_values",
    "_reduce_latent_values",
    "_reduce_component_latent_values",
)


def patch_flow_factory(trainer_class, impl="auto"):
    """Replaces `_implicit_reward`; adapters that override how means are taken keep the original.

    Means are over the elements that the state's `active_masks` leave, where it has masks. Of several
    components each has a scale of its own, and all their elements weigh the same.
    """
    from flow_factory.models.abc import BaseAdapter

    original = trainer_class._implicit_reward

    def _implicit_reward(self, velocity, old_velocity, noised):
        if any(_overridden(self.adapter, name, BaseAdapter) for name in REDUCTIONS):
            return original(self, velocity, old_velocity, noised)
        masks = getattr(noised.state, "active_masks", None)  # older versions have none
        rewards, counts = [], []
        for name in self.adapter.trajectory_component_order:
            target = noised.target_velocity.components[name]
            mask = None if masks is None else masks[name]
            nothing = torch.zeros((), dtype=target.dtype, device=target.device).expand_as(target)
            reward = implicit_reward(
                velocity.components[name],
                old_velocity.components[name],
                nothing,  # x0 and noise enter as noise - x0 alone
                target,
                mask=mask,
                adaptive_weighting=bool(self.adaptive_logp),
                impl=impl,
            )
            rewards.append(reward)
            counts.append(target[0].numel() if mask is None else mask.expand_as(target).flatten(1).sum(1))
        if len(rewards) == 1:
            return rewards[0]
        return sum(count * reward for count, reward in zip(counts, rewards)) / sum(counts)

    trainer_class._implicit_reward = _implicit_reward
    return trainer_class


def _overridden(adapter, name, base):
    """Whether this adapter's method is another than its base class has."""
    return getattr(getattr(adapter, name, None), "__func__", None) is not getattr(base, name, None)


def diffusion_nft_loss(
    forward_prediction,
    old_prediction,
    ref_forward_prediction,
    x0,
    noise,
    t,
    advantages,
    *,
    beta,
    adv_clip_max,
    kl_beta,
    effective_grad_accum_steps=1,
    impl="auto",
):
    """What the script calls `scaled_loss`, ready for backward, and what those lines log, but old_kl_div.

    t: (B,) in (0, 1]; advantages: (B,), before clipping. beta is config.beta, adv_clip_max and kl_beta are
    config.train's adv_clip_max and beta. The loss is divided by effective_grad_accum_steps, the backward
    passes of one optimizer step; what is logged is not.
    """
    steps = effective_grad_accum_steps
    out = nft_loss(
        forward_prediction,
        old_prediction,
        ref_forward_prediction,
        x0,
        noise,
        advantages,
        t,
        beta=beta,
        kl_beta=kl_beta,
        advantage_clip=adv_clip_max,
        denominator=steps * len(x0),
        impl=impl,
    )
    total, kl = steps * out.loss.detach(), out.kl.mean()
    policy_loss = total - kl_beta * kl
    terms = {
        "policy_loss": policy_loss,
        "unweighted_policy_loss": policy_loss / adv_clip_max,
        "kl_div_loss": kl,
        "kl_div": kl,
        "old_deviate": out.old_deviation.mean(),
        "total_loss": total,
    }
    return out.loss, terms
