"""What is remembered of one layout serves no tensors that lie otherwise."""

import weakref

import pytest
import torch
from crd_kernels import center, crd_loss, interpolate, measure, velocity_grad
from kernel_oracle import crd, make, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

OTHERS = ("old", "ref_cond", "x0", "noise", "advantage", "group")


class Marked(torch.Tensor):
    """A tensor as libraries derive them to say what it holds."""


class Watching(TorchDispatchMode):
    """Makes the package call its registered operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def loss_and_gradient(x, impl, **settings):
    policy = x["policy"].detach().requires_grad_()
    out = crd_loss(policy, *(x[name] for name in OTHERS), **settings, impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, policy)
    return out.loss.detach(), gradient


@pytest.mark.parametrize("name", ("policy", *OTHERS))
def test_a_derived_tensor_of_another_size_is_looked_at_anew(impl, name):
    """The second call has more samples and fewer elements than the first."""
    for batch, shape in ((3, (4, 6, 6)), (7, (5,))):
        x = make(batch=batch, shape=shape)
        wanted = crd(x)
        marked = {**x, name: x[name].as_subclass(Marked)}
        loss, gradient = loss_and_gradient(marked, impl)
        assert relative_error(loss, wanted["loss"]) < 1e-11
        assert relative_error(gradient, wanted["grad"]) < 1e-11
        others = [marked[key] for key in OTHERS[:4]]
        stats = measure(marked["policy"], *others, impl=impl)
        assert relative_error(stats.kl, wanted["kl"]) < 1e-11
        scalars = marked["advantage"], marked["group"]
        assert relative_error(center(stats, *scalars, impl=impl).loss, wanted["loss"]) < 1e-11
        coefficients = type("C", (), {"c1": torch.ones(batch), "c2": torch.zeros(batch)})
        gradient = velocity_grad(marked["policy"], *others[1:], coefficients, impl=impl)
        residual = x["policy"] - (x["noise"] - x["x0"])
        assert relative_error(torch.as_tensor(gradient), residual) < 1e-6


def test_a_tensor_without_memory_is_refused_after_one_that_had_some(impl):
    x = make()
    loss_and_gradient(x, impl)
    for name in OTHERS:
        with pytest.raises(ValueError, match=f"^{name}: expected device .*, got meta"):
            loss_and_gradient({**x, name: x[name].to("meta")}, impl)


@pytest.mark.parametrize("double", [None, "old", "policy"])
def test_saved_tensors_may_come_back_in_another_layout(impl, double):
    """As copies that were kept on the host do: contiguous, where slices went."""
    x = make(dtype=torch.float32)
    for name in ("policy", *OTHERS[:4]):
        x[name] = torch.stack([x[name], torch.full_like(x[name], float("nan"))], -1)[..., 0]
    if double:
        x[double] = x[double].double()
    wanted_loss, wanted = loss_and_gradient(x, impl)
    policy = x["policy"].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().contiguous(), lambda t: t):
        out = crd_loss(policy, *(x[name] for name in OTHERS), impl=impl)
    assert torch.equal(out.loss, wanted_loss)
    out.loss.backward()
    assert torch.equal(policy.grad, wanted)


def test_operators_know_what_a_loss_was_computed_in(impl):
    """Only `old`, which the gradient does not read, is float64."""
    x = make(dtype=torch.float32)
    x["old"] = x["old"].double()
    loss, gradient = loss_and_gradient(x, impl)
    with Watching():
        by_operators = loss_and_gradient(x, impl)
    assert torch.equal(by_operators[0], loss) and torch.equal(by_operators[1], gradient)
    assert relative_error(gradient, crd(x)["grad"]) < 6e-8  # one rounding to float32


def test_the_default_device_does_not_matter(impl):
    x = make()
    wanted = loss_and_gradient(x, impl)
    sigma = torch.full_like(x["advantage"], 0.3)
    noised = interpolate(x["x0"], sigma, x["noise"], impl=impl)
    with torch.device("meta"):
        found = loss_and_gradient(x, impl)
        again = interpolate(x["x0"], sigma, x["noise"], impl=impl)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert torch.equal(again, noised)


@pytest.mark.parametrize("inference", [False, True])
def test_latents_are_let_go_after_the_backward(impl, inference):
    with torch.inference_mode(inference):
        x = make()
    policy = make()["policy"].requires_grad_()
    out = crd_loss(policy, *(x[name] for name in OTHERS), impl=impl)
    kept = {name: weakref.ref(x[name]) for name in ("ref_cond", "x0", "noise")}
    del x
    out.loss.backward(retain_graph=True)
    assert all(kept[name]() is not None for name in kept)
    first = policy.grad.clone()
    out.loss.backward()
    assert torch.equal(policy.grad, 2 * first)
    assert [name for name in kept if kept[name]() is not None] == []
    with pytest.raises(RuntimeError, match="a second time"):
        out.loss.backward()


def test_nothing_but_policy_gets_a_gradient(impl):
    x = make()
    for name in ("old", "ref_cond", "x0", "noise", "advantage"):
        x[name].requires_grad_()
    policy = x["policy"].requires_grad_()
    stats = measure(policy, *(x[name] for name in OTHERS[:4]), impl=impl)
    assert not stats.table.requires_grad
    for given in (policy, policy.detach()):
        out = crd_loss(given, *(x[name] for name in OTHERS), impl=impl)
        assert out.loss.requires_grad is given.requires_grad
        assert not out.kl.requires_grad and not out.policy_loss.requires_grad
