"""A diffusers training script's loss replaced: SD3 flow matching with timestep weighting.

    python examples/diffusers_loss.py

Those scripts compute, in full-size float32 temporaries,

    target = noise - model_input
    squares = weighting.float() * (model_pred.float() - target.float()) ** 2
    loss = torch.mean(squares.reshape(B, -1), 1).mean()

which is `flow_matching_loss(model_pred, model_input, noise, weight=weighting)`: one pass each way.
"""

import torch
from crd_kernels import flow_matching_loss, interpolate
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3


def tiny_transformer():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )


def train(steps=20, batch=8, seed=0):
    """Overfits one batch; returns the losses."""
    torch.manual_seed(seed)
    transformer = tiny_transformer()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    scheduler = FlowMatchEulerDiscreteScheduler()
    model_input = torch.randn(batch, 4, 8, 8)
    prompt_embeds, pooled = torch.randn(batch, 6, 32), torch.randn(batch, 64)
    losses = []
    for _ in range(steps):
        noise = torch.randn_like(model_input)
        density = compute_density_for_timestep_sampling("logit_normal", batch, logit_mean=0.0, logit_std=1.0)
        indices = (density * scheduler.config.num_train_timesteps).long()
        timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices]
        model_pred = transformer(
            hidden_states=interpolate(model_input, sigmas, noise),
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        weighting = compute_loss_weighting_for_sd3("none", sigmas=sigmas)
        loss = flow_matching_loss(model_pred, model_input, noise, weight=weighting).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
