"""Plain flow matching."""

from torch import Tensor

from .. import checks
from ..problem import Kind, Latents, Numbers, Scalars
from .common import LossOutput, loss_of


def flow_matching_loss(
    policy: Tensor,  # (B, ...)
    x0: Tensor,  # (B, ...)
    noise: Tensor | None,  # (B, ...)
    *,
    weight: Tensor | None = None,  # (B,) float
    seed: Tensor | None = None,  # (B,) int64
    mask: Tensor | None = None,  # broadcasts to (B, ...)
    impl: str = "auto",
) -> LossOutput:
    """mean_i weight_i mean((policy_i - target_i)^2), target = noise - x0.

    weight: per sample, of any sign; 1 where not given. Returns a `LossOutput`; mask and errors as in
    `measure`.
    Source: Lipman et al., "Flow matching for generative modeling", arXiv 2210.02747.
    """
    checks.tensor("policy", policy)
    latents = Latents(policy, None, None, None, x0, noise, seed, checks.mask(mask, policy))

    def check():
        latents.check()
        if weight is not None:  # by its own name: among the scalars it stands for the advantage
            checks.per_sample("weight", weight, policy.shape[0], policy.device)

    return loss_of("flow_matching_loss", latents, Scalars(weight), KIND, NUMBERS, impl, check)


KIND, NUMBERS = Kind("flow_matching"), Numbers()
