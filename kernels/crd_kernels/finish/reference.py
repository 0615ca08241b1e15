"""What comes after the sums, as its definition: torch ops on B scalars in float64."""

import torch

from ..centering import reference as centering
from ..losses import scalars as losses
from ..problem import Kind, Numbers, Scalars
from ..velocity.stats import Stats


def finish(stats, scalars: Scalars, kind: Kind, numbers: Numbers, process_group=None):
    """The loss, () or for the method "reward" the implicit reward, (B,); and the outcome (OUTCOME, B)."""
    c3 = None
    if kind.method == "crd":
        policy_loss, kl_loss, c1, c2 = centering.center(stats, scalars, kind, numbers, process_group)
    else:
        policy_loss, kl_loss, c1, c2, c3 = getattr(losses, kind.method)(stats, scalars, kind, numbers)
    loss = policy_loss + kl_loss if kind.method != "reward" else stats.implicit_reward.clone()
    c3 = torch.zeros_like(c1) if c3 is None else c3
    outcome = torch.stack([c1, c2, c3, policy_loss.expand_as(c1), kl_loss.expand_as(c1)])
    return loss.to(stats.table.dtype), outcome.to(stats.table.dtype)


@torch.no_grad()
def table_and_loss(table, scalars: Scalars, kind: Kind, numbers: Numbers):
    """The table with its outcome, and the loss. After NFT its policy_error is the policy's own."""
    stats = Stats(table, 0)
    loss, outcome = finish(stats, scalars, kind, numbers)
    table = torch.cat([table, outcome])
    if kind.method == "nft":
        Stats(table, 0).policy_error.copy_(losses.error_of_policy(stats, numbers.beta))
    return table, loss
