"""Our losses inside the two public trainers that people have, given their tensors and their names.

Flow-Factory's CRD trainer: call `patch_flow_factory` once before training.

    from flow_factory.trainers.rl.crd import CRDTrainer
    patch_flow_factory(CRDTrainer)

It replaces the per-sample reward, where that trainer spends its loss time and memory (float64 copies of every
latent); its centering and its KL stay. Two things that it does by itself stay too: it centers over whatever
shares a micro-batch, so keep whole groups in one.

DiffusionNFT's training script: its loss is written inline, from `positive_prediction = ...` to
`loss = ...`; replace those lines by one call of `diffusion_nft_loss`.
"""

import torch
from crd_kernels import implicit_reward, nft_loss


def patch_flow_factory(trainer_class, impl="auto"):
    """Replaces `_implicit_reward` for latents of one component; others take the original way."""
    original = trainer_class._implicit_reward

    def _implicit_reward(self, velocity, old_velocity, noised):
        names = list(self.adapter.trajectory_component_order)
        if len(names) != 1:
            return original(self, velocity, old_velocity, noised)
        target = noised.target_velocity.components[names[0]]
        nothing = torch.zeros((), dtype=target.dtype, device=target.device).expand_as(target)
        return implicit_reward(
            velocity.components[names[0]],
            old_velocity.components[names[0]],
            nothing,  # x0 and noise enter as noise - x0 alone
            target,
            adaptive_weighting=bool(self.adaptive_logp),
            impl=impl,
        )

    trainer_class._implicit_reward = _implicit_reward
    return trainer_class


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
    impl="auto",
):
    """The script's total loss and the terms that it logs under the same names.

    t: (B,) in (0, 1]; advantages: (B,), before clipping. beta is config.beta, adv_clip_max and kl_beta are
    config.train's.
    """
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
        impl=impl,
    )
    kl_loss = out.kl.mean()
    terms = {
        "policy_loss": out.loss.detach() - kl_beta * kl_loss,
        "kl_div_loss": kl_loss,
        "kl_loss": kl_beta * kl_loss,
        "old_deviate": out.old_deviation.mean(),
        "total_loss": out.loss.detach(),
    }
    return out.loss, terms
