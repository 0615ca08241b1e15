"""The two passes as registered operators (see finish/ops.py for how they travel through torch.compile)."""

import torch
from torch import Tensor

from .. import passes
from ..problem import NOTHING, Kind, Latents, Numbers, compute_dtype
from ..registration import autograd, fake, register
from .stats import ROWS

ONCE = "{}: expected to be differentiated once, got a second-order gradient"
# by what a kind calls the method
PUBLIC = {"reward": "implicit_reward", "dpo": "diffusion_dpo_loss"}


@register
def measure_op(
    policy: Tensor,
    old: Tensor | None,
    ref_cond: Tensor | None,
    ref_uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    numbers: Tensor,
    kind: str,
    impl: str,
) -> Tensor:
    """The (ROWS, B) table of statistics."""
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, mask)
    run = passes.of(impl, latents, NOTHING, Kind.parse(kind))
    return run.measure(latents, Numbers(*numbers.tolist()))


@fake("measure")
def _(policy, old, ref_cond, ref_uncond, x0, noise, *others):
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    return policy.new_empty((ROWS, policy.shape[0]), dtype=dtype)


@register
def velocity_grad_op(
    policy: Tensor,
    old: Tensor | None,
    ref_cond: Tensor | None,
    ref_uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    c1: Tensor,
    c2: Tensor,
    c3: Tensor | None,
    numbers: Tensor,
    impl: str,
) -> Tensor:
    """mask (c1 (policy - target) + c2 (policy - reference) + c3 (policy - old)), in policy's dtype."""
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, mask)
    run = passes.of(impl, latents, (c1, c2, c3), Kind("measure", old_term=c3 is not None))
    return run.gradient(latents, (c1, c2, c3), Numbers(*numbers.tolist()))


@fake("velocity_grad")
def _(policy, *others):
    return torch.empty_like(policy)


@register
def loss_grad_op(
    policy: Tensor,
    old: Tensor | None,
    ref_cond: Tensor | None,
    ref_uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    table: Tensor,
    upstream: Tensor,
    numbers: Tensor,
    kind: str,
    impl: str,
) -> Tensor:
    """The gradient of the loss that left this table, times the gradient that came in, in policy's dtype."""
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, mask)
    run, latents = passes.again(impl, latents, Kind.parse(kind))
    return run.backward(latents, table, upstream, Numbers(*numbers.tolist()))


@fake("loss_grad")
def _(policy, *others):
    return torch.empty_like(policy)


@register
def attach_gradient_op(
    loss: Tensor,
    policy: Tensor,
    old: Tensor | None,
    ref_cond: Tensor | None,
    ref_uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    table: Tensor,
    numbers: Tensor,
    kind: str,
    impl: str,
) -> Tensor:
    """A copy of `loss` whose gradient with respect to `policy` is the velocity gradient.

    loss is a scalar, or (B,) where each entry depends on its own sample alone. table: what it left. The
    backward runs the gradient pass with the incoming gradient: no stored gradient, no second pass to scale
    it, no look at its value on the host.
    """
    return loss.clone()


@fake("attach_gradient")
def _(loss, *others):
    return torch.empty_like(loss)


def _save(ctx, inputs, output):
    _, *tensors, kind, impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.static = kind, impl


def _backward(ctx, upstream):
    *latents, table, numbers = ctx.saved_tensors
    gradient = None
    if ctx.needs_input_grad[1]:
        gradient = loss_grad_op(*latents, table, upstream, numbers, *ctx.static)
    return None, gradient, *[None] * 11


def _keep_name(ctx, inputs, output):
    method = Kind.parse(inputs[-2]).method
    ctx.name = PUBLIC.get(method, f"{method}_loss")


def _refuse(ctx, _):
    raise RuntimeError(ONCE.format(ctx.name))


autograd("attach_gradient", _backward, _save)
autograd("loss_grad", _refuse, _keep_name)
