"""Centered reward distillation in a training loop of one's own: 40 lines around `crd_loss`.

    python examples/own_training_loop.py

A small velocity model of 2-D points learns to put them where the reward is. Everything is exact and runs in
seconds on a CPU; swap in your own model, sampler and reward.
"""

import copy

import torch
from crd_kernels import crd_loss, interpolate


def velocity_model():
    layers = [
        torch.nn.Linear(3, 64),
        torch.nn.SiLU(),
        torch.nn.Linear(64, 64),
        torch.nn.SiLU(),
        torch.nn.Linear(64, 2),
    ]
    return torch.nn.Sequential(*layers)


def predict(model, x, sigma):
    return model(torch.cat([x, sigma[:, None]], dim=1))


@torch.no_grad()
def sample(model, count, steps=10):
    x = torch.randn(count, 2)
    for step in range(steps):
        x = x - predict(model, x, torch.full((count,), 1 - step / steps)) / steps
    return x


def reward_of(x):  # the black box
    return -(x - torch.tensor([1.5, 0.0])).norm(dim=1)


def train(iterations=60, samples=48, seed=0):
    torch.manual_seed(seed)
    policy = velocity_model()
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for _ in range(300):  # pretraining: points around the origin
        x0, noise, sigma = 0.5 * torch.randn(256, 2), torch.randn(256, 2), torch.rand(256)
        error = predict(policy, interpolate(x0, sigma, noise), sigma) - (noise - x0)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    reference, old = copy.deepcopy(policy), copy.deepcopy(policy)

    rewards = []
    for _ in range(iterations):
        x0 = sample(old, samples)
        reward = reward_of(x0)
        rewards.append(reward.mean().item())
        advantage = (reward - reward.mean()) / reward.std().clamp(min=1e-6)
        for sigma in (0.3, 0.6, 0.9):  # one group per timestep: here all samples share a prompt
            level, noise = torch.full((samples,), sigma), torch.randn_like(x0)
            x_sigma = interpolate(x0, level, noise)
            with torch.no_grad():
                frozen = [predict(model, x_sigma, level) for model in (old, reference)]
            group = torch.zeros(samples, dtype=torch.int64)
            out = crd_loss(
                predict(policy, x_sigma, level), *frozen, x0, noise, advantage, group, kl_beta=0.01
            )
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        for theirs, ours in zip(old.parameters(), policy.parameters()):
            theirs.data.lerp_(ours.data, 0.5)
    return rewards


if __name__ == "__main__":
    rewards = train()
    print(f"mean reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")
