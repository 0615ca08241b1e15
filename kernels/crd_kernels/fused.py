"""From checked arguments to a loss with a gradient: what every public function of this package ends in.

Plain tensors take the short way: the passes that served this layout before are called directly, and one
autograd function hands out the gradient. Under torch.compile, torch.export and with tensors that are none
(FakeTensor, wrappers) the registered operators stand in their place.
"""

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from . import dispatch, passes
from .centering.coefficients import Coefficients
from .finish import ops as finish_ops
from .problem import NOTHING, Kind, Latents, Numbers, Scalars, compute_dtype
from .velocity import ops
from .velocity.stats import Stats

if TYPE_CHECKING:  # absent from a torch without torch.distributed
    from torch.distributed import ProcessGroup

saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def loss(check, latents: Latents, scalars: Scalars, kind: Kind, numbers: Numbers, impl: str, name: str):
    """The loss, with a gradient for policy, and the table, (ROWS + OUTCOME, B), that it left.

    check() validates the tensors; it is not called again for tensors that look like ones that passed.
    name: of the public function, for errors.
    """
    run, impl = _find(check, latents, scalars, kind, impl, name)
    if run is None:
        tensors = map(_detached, (*latents, *scalars))
        table, value = finish_ops.loss_op(*tensors, pack(numbers), str(kind), impl)
        return attach(value, table, latents, kind, numbers, impl), table
    if latents.policy.requires_grad and torch.is_grad_enabled():
        return _recorded(run, latents, scalars, numbers, impl, name)
    table, value = run.forward(latents, scalars, numbers)
    return value, table


def _recorded(run, latents: Latents, scalars: Scalars, numbers: Numbers, impl: str, name: str):
    """The loss and its table, of plain tensors, with what autograd needs for its gradient."""
    policy, call = latents.policy, Call(run, latents, scalars, numbers, name)
    if saved_tensors_hooks(True) is not None:  # what they give back may lie otherwise
        call.hooked = dispatch.choose(impl, policy.device)
    try:
        value = _apply(policy, call)
    except RuntimeError:
        call.inference = any(t is not None and t.is_inference() for t in latents)
        if not call.inference:
            raise
        value = _apply(policy, call)  # autograd will not save what was made in inference mode: we hold it
    return value, call.table


def measure(check, latents: Latents, kind: Kind, numbers: Numbers, impl: str, name: str = "measure"):
    """The table of statistics. name: of the public function, for errors."""
    run, impl = _find(check, latents, NOTHING, kind, impl, name)
    if run is None:
        return ops.measure_op(*map(_detached, latents), pack(numbers), str(kind), impl)
    return run.measure(latents, numbers)


def gradient(check, latents: Latents, coefficients, numbers: Numbers, impl: str):
    """c1 (policy - target) + c2 (policy - reference) + c3 (policy - old), times the mask."""
    kind = Kind("measure", old_term=coefficients[2] is not None)
    run, impl = _find(check, latents, coefficients, kind, impl, "velocity_grad")
    if run is None:
        return ops.velocity_grad_op(*map(_detached, (*latents, *coefficients)), pack(numbers), impl)
    return run.gradient(latents, coefficients, numbers)


def coefficients(
    stats: Stats,
    scalars: Scalars,
    kind: Kind,
    numbers: Numbers,
    impl: str,
    name: str,
    process_group: "ProcessGroup | None" = None,
) -> Coefficients:
    """What a loss of `kind` makes of measured statistics. Raises TypeError or ValueError.

    name: of the public function, for errors.
    """
    if not isinstance(stats, Stats):
        raise TypeError(f"stats: expected a Stats, got {type(stats).__name__}")
    refuse_transforms(name, stats.table)
    if stats.table.dtype not in (torch.float32, torch.float64):
        stats = stats.to(torch.float32)
    table, device = stats.table, stats.table.device
    if len(stats) == 0 and process_group is None:  # over ranks everybody is to fail, after the exchange
        raise ValueError("stats: expected at least one sample, got none")
    scalars.check(len(stats), device)
    scalars = Scalars(*(None if t is None else t.resolve_neg() for t in scalars))
    impl = dispatch.choose(impl, device)
    with torch.no_grad():
        table = table.resolve_neg()
        if kind.method == "nft":
            table = table.clone()  # what finishes NFT leaves the policy's own error in it
        if process_group is None and traced(table):
            loss, outcome = finish_ops.finish_op(table, *scalars, pack(numbers), str(kind), impl)
        else:
            loss, outcome = finish_ops.finish(table, scalars, kind, numbers, impl, process_group)
    c1, c2, c3, policy_loss, kl_loss = outcome.unbind(0)
    return Coefficients(loss, policy_loss[0], kl_loss[0], c1, c2, c3 if kind.old_term else None)


def _find(check, latents: Latents, scalars, kind: Kind, impl: str, name: str):
    """(passes, impl) for these tensors; no passes where the registered operators stand in for them.

    The impl is resolved wherever the tensors were checked: where they are new, and for the operators.
    """
    policy, key = latents.policy, None
    refuse_transforms(name, policy)
    if not traced(policy):
        look = passes.signature(latents, scalars)
        if look is not None:
            key = impl, kind, look
            run = passes.known(key)
            if run is not None:
                return run, impl
    check()
    impl = dispatch.choose(impl, policy.device)
    return (None if key is None else passes.of(impl, latents, scalars, kind, key)), impl


def attach(value, table, latents: Latents, kind: Kind, numbers: Numbers, impl: str):
    """A copy of `value`, () or (B,), with the gradient for policy that the outcome in `table` says."""
    policy = latents.policy
    if not (policy.requires_grad and torch.is_grad_enabled()):
        return value
    if not kind.old_term and compute_dtype(policy, *latents[2:6]) == table.dtype:
        latents = latents._replace(old=None)
    others = map(_detached, latents[1:])
    return ops.attach_gradient_op(value, policy, *others, table, pack(numbers), str(kind), impl)


class Call:
    """One loss call on its way through autograd, which looks at each argument: so they are one."""

    __slots__ = ("hooked", "inference", "latents", "name", "numbers", "run", "scalars", "table")
    table: torch.Tensor  # once it has run

    def __init__(self, run, latents, scalars, numbers, name):
        self.run, self.latents, self.scalars, self.numbers, self.name = run, latents, scalars, numbers, name
        self.inference = False
        self.hooked = None  # the implementation, where hooks look after the saved tensors


class _Loss(torch.autograd.Function):
    """Runs the loss and keeps what the gradient pass needs: inputs that are alive anyway, and B scalars."""

    @staticmethod
    def forward(ctx, policy, call):
        run, numbers = call.run, call.numbers
        call.table, value = run.forward(call.latents, call.scalars, numbers)
        _, old, *kept = call.latents
        kept.append(old if run.kind.old_term or call.hooked else None)  # the gradient seldom needs it
        ctx.call = run, numbers, call.name, call.hooked
        ctx.frozen = None
        if call.inference:
            ctx.frozen = [t if t is not None and t.is_inference() else None for t in kept]
            kept = [None if t is None or t.is_inference() else t for t in kept]
        ctx.save_for_backward(policy, *kept, call.table)
        return value

    @staticmethod
    def backward(ctx, upstream):
        run, numbers, name, hooked = ctx.call
        policy, *kept, table = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(upstream):  # of is_grads_batched
            raise RuntimeError(f"{name}: expected backward() for one gradient at a time, got a batch of them")
        if ctx.frozen is not None:
            kept = [saved if held is None else held for saved, held in zip(kept, ctx.frozen)]
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                ctx.frozen = None  # as autograd does with what it saved
        *others, old = kept
        latents = Latents(policy, old, *others)
        if hooked is not None:
            run, latents = passes.again(hooked, latents, run.kind)
        if not torch.is_grad_enabled():
            return run.backward(latents, table, upstream, numbers), None
        with torch.no_grad():  # create_graph=True
            gradient = run.backward(latents, table, upstream, numbers)
        return _OnlyOnce.apply(gradient, policy, upstream, name), None


# Past torch's own `apply`, which first looks for remains of function transforms: those are refused before.
_apply = super(torch.autograd.Function, _Loss).apply


class _OnlyOnce(torch.autograd.Function):
    """A gradient that refuses to be differentiated: it depends on what was not recorded."""

    @staticmethod
    def forward(ctx, gradient, policy, upstream, name):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(ops.ONCE.format(ctx.name))


def refuse_transforms(name, policy):
    """Function transforms and forward mode would see a constant where the loss depends on policy.

    Under torch.compile, which does not follow what is asked of the second, the transforms alone.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{name}: expected backward() or torch.autograd.grad, got a torch.func transform")
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(policy).tangent is not None:
        raise RuntimeError(f"{name}: expected backward() or torch.autograd.grad, got a forward-mode gradient")


def pack(numbers: Numbers) -> torch.Tensor:
    """The numbers as a float64 tensor on the CPU; as products of a tensor, torch.compile keeps them open."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * number for number in numbers])


def traced(policy) -> bool:
    """Whether operators must be called by their registered names."""
    if torch.compiler.is_compiling():
        return True
    return type(policy) not in passes.PLAIN or torch._C._len_torch_dispatch_stack() > 0


def _detached(tensor):
    return None if tensor is None else tensor.detach()
