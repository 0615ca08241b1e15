"""The passes as registered operators, so that torch.compile, FakeTensor and autograd know them.

Arguments arrive checked (api.py) and `impl` is never "auto".
"""

import importlib

import torch
from torch import Tensor

from ..registration import register
from .stats import ROWS, compute_dtype


def _implementation(impl):
    return importlib.import_module(f".{impl}", __package__)


@register
def measure_op(
    policy: Tensor,
    old: Tensor,
    ref_cond: Tensor | None,
    ref_uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    guidance_scale: float,
    adaptive_weighting: bool,
    mix: float,
    impl: str,
) -> Tensor:
    """The (ROWS, B) table of statistics."""
    run = _implementation(impl).measure
    return run(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, adaptive_weighting, mix)


@torch.library.register_fake("crd_kernels::measure")
def _(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, adaptive_weighting, mix, impl):
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
    c1: Tensor,
    c2: Tensor,
    c3: Tensor | None,
    guidance_scale: float,
    impl: str,
) -> Tensor:
    """c1 (policy - target) + c2 (policy - reference) + c3 (policy - old), in policy's dtype."""
    run = _implementation(impl).velocity_grad
    return run(policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale)


@torch.library.register_fake("crd_kernels::velocity_grad")
def _(policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale, impl):
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
    c1: Tensor,
    c2: Tensor,
    c3: Tensor | None,
    guidance_scale: float,
    impl: str,
) -> Tensor:
    """A copy of `loss` whose gradient with respect to `policy` is the velocity gradient.

    loss is a scalar, or (B,) where each entry depends on its own sample alone. The backward runs the gradient
    pass with c1, c2 and c3 scaled by the incoming gradient: no stored gradient, no second pass to scale it,
    no look at the scale's value on the host.
    """
    return loss.clone()


@torch.library.register_fake("crd_kernels::attach_gradient")
def _(loss, policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale, impl):
    return torch.empty_like(loss)


def _save(ctx, inputs, output):
    _, *tensors, guidance_scale, impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = guidance_scale, impl


def _backward(ctx, grad):
    policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3 = ctx.saved_tensors
    gradient = None
    if ctx.needs_input_grad[1]:
        gradient = velocity_grad_op(
            policy,
            old,
            ref_cond,
            ref_uncond,
            x0,
            noise,
            seed,
            c1 * grad,
            c2 * grad,
            None if c3 is None else c3 * grad,
            *ctx.settings,
        )
    return None, gradient, *[None] * 11


torch.library.register_autograd("crd_kernels::attach_gradient", _backward, setup_context=_save)


class AttachGradient(torch.autograd.Function):
    """The same for eager calls, past the dispatcher: its generic autograd costs some 100 microseconds."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        return inputs[0].clone()

    backward = staticmethod(_backward)
