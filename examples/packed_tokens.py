"""Images of different sizes in one batch.

    python examples/packed_tokens.py

Tokens are padded to the longest sample's, and a mask leaves the padding out.
"""

import torch
from crd_kernels import flow_matching_loss


def padded_loss(velocities, x0s, noises):
    """Of each a list of (tokens_i, C). The mean over samples of each sample's mean error."""
    pad = torch.nn.utils.rnn.pad_sequence
    policy, x0, noise = (pad(tensors, batch_first=True) for tensors in (velocities, x0s, noises))
    ones = [torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device) for tokens in x0s]
    mask = pad(ones, batch_first=True)  # (B, tokens, 1), for latents (B, tokens, C)
    return flow_matching_loss(policy, x0, noise, mask=mask).loss


if __name__ == "__main__":
    velocities, x0s, noises = ([torch.randn(tokens, 16) for tokens in (256, 192, 320)] for _ in range(3))
    print(f"loss {padded_loss(velocities, x0s, noises):.3f} of images of 256, 192 and 320 tokens")
