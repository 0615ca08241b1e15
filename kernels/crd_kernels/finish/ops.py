"""Losses as registered operators, so that torch.compile, torch.export, FakeTensor and autograd know them.

Arguments arrive checked and `impl` is never "auto". Numbers travel as a float64 tensor on the CPU: as plain
floats every new value would be compiled anew. That excludes the operators from CUDA graphs, in which the
numbers of the capture would stay.
"""

import functools

from torch import Tensor

from .. import passes
from ..problem import Kind, Latents, Numbers, Scalars, compute_dtype
from ..registration import fake, register
from ..velocity.stats import OUTCOME, ROWS, Stats
from . import reference


@register
def loss_op(
    policy: Tensor,
    old: Tensor | None,
    ref_cond: Tensor | None,
    ref_uncond: Tensor | None,
    x0: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    advantage: Tensor | None,
    group: Tensor | None,
    sigma: Tensor | None,
    kl_weight: Tensor | None,
    old_error: Tensor | None,
    numbers: Tensor,
    kind: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The (ROWS + OUTCOME, B) table of statistics and what comes of them, and the loss."""
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, mask)
    scalars = Scalars(advantage, group, sigma, kl_weight, old_error)
    run = passes.of(impl, latents, scalars, Kind.parse(kind))
    return run.forward(latents, scalars, Numbers(*numbers.tolist()))


@fake("loss")
def _(policy, old, ref_cond, ref_uncond, x0, noise, *others):
    kind = Kind.parse(others[-2])
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    batch = policy.shape[0]
    return policy.new_empty((ROWS + OUTCOME, batch), dtype=dtype), _fake_loss(policy, batch, dtype, kind)


@register
def finish_op(
    table: Tensor,
    advantage: Tensor | None,
    group: Tensor | None,
    sigma: Tensor | None,
    kl_weight: Tensor | None,
    old_error: Tensor | None,
    numbers: Tensor,
    kind: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """From a table of statistics: the loss, and what comes of them, (OUTCOME, B)."""
    scalars = Scalars(advantage, group, sigma, kl_weight, old_error)
    return finish(table, scalars, Kind.parse(kind), Numbers(*numbers.tolist()), impl)


@fake("finish")
def _(table, *others):
    batch = table.shape[1]
    loss = _fake_loss(table, batch, table.dtype, Kind.parse(others[-2]))
    return loss, table.new_empty((OUTCOME, batch))


def _fake_loss(like, batch, dtype, kind):
    return like.new_empty((batch,) if kind.method == "reward" else (), dtype=dtype)


def finish(table, scalars: Scalars, kind: Kind, numbers: Numbers, impl: str, process_group=None):
    """`finish_op` on plain tensors; over the ranks of a process group always by its definition."""
    if process_group is None and impl == "triton":
        table = table.contiguous()
        scalars = Scalars(*(None if t is None else t.contiguous() for t in scalars))
        look = passes.signature((table,), scalars)
        run = _launch(kind, look) if look else _make(kind, table.device, table.dtype, table.shape)
        outcome = table.new_empty((OUTCOME, table.shape[1]))
        return run(table, outcome, run.work(), scalars, numbers), outcome
    if process_group is None and impl == "cpu":
        from . import cpu

        return cpu.finish(table, scalars, kind, numbers)
    return reference.finish(Stats(table, 0), scalars, kind, numbers, process_group)


@functools.lru_cache(maxsize=128)
def _launch(kind, look):
    """The launch for tensors that look like this (`passes.signature`): compiled code serves only its like."""
    return _make(kind, *look[:3])


def _make(kind, device, dtype, shape):
    from .triton import Finish

    return Finish(kind, shape[1], dtype, device)
