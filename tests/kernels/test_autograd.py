"""What autograd may ask of a loss: once, backwards, on any layout; everything else is refused by name."""

import itertools

import pytest
import torch
from crd_kernels import (
    awm_loss,
    center,
    crd_loss,
    diffusion_dpo_loss,
    flow_matching_loss,
    implicit_reward,
    interpolate,
    measure,
    nft_loss,
    velocity_grad,
)
from kernel_oracle import INTERPRETING, crd, make, relative_error
from torch.utils.flop_counter import FlopCounterMode

LOSSES = {
    "crd_loss": lambda p, x, impl: (
        crd_loss(p, x["old"], x["ref_cond"], x["x0"], x["noise"], x["advantage"], x["group"], impl=impl).loss
    ),
    "nft_loss": lambda p, x, impl: (
        nft_loss(
            p,
            x["old"],
            x["ref_cond"],
            x["x0"],
            x["noise"],
            x["advantage"],
            x["advantage"].sigmoid(),
            impl=impl,
        ).loss
    ),
    "awm_loss": lambda p, x, impl: (
        awm_loss(p, x["ref_cond"], x["x0"], x["noise"], x["advantage"], kl_beta=0.1, impl=impl).loss
    ),
    "diffusion_dpo_loss": lambda p, x, impl: (
        diffusion_dpo_loss(p, x["old"], x["x0"], x["noise"], beta=5.0, impl=impl).loss
    ),
    "flow_matching_loss": lambda p, x, impl: flow_matching_loss(p, x["x0"], x["noise"], impl=impl).loss,
    "implicit_reward": lambda p, x, impl: implicit_reward(p, x["old"], x["x0"], x["noise"], impl=impl).sum(),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_second_order_gradients_are_refused(impl, name):
    x = make(batch=4)
    policy = x["policy"].clone().requires_grad_()
    loss = LOSSES[name](policy, x, impl)
    (gradient,) = torch.autograd.grad(loss, policy, create_graph=True)
    (plain,) = torch.autograd.grad(LOSSES[name](policy, x, impl), policy)
    assert torch.equal(gradient.detach(), plain) and plain.abs().max() > 0
    message = f"^{name}: expected to be differentiated once, got a second-order gradient"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(gradient.square().sum(), policy)


@every_loss
def test_function_transforms_and_forward_mode_are_refused(impl, name):
    x = make(batch=4)
    message = f"^{name}: expected backward"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda p: LOSSES[name](p, x, impl))(x["policy"])
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda p: LOSSES[name](p, x, impl), (x["policy"],), (x["policy"],))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=message),
    ):
        LOSSES[name](torch.autograd.forward_ad.make_dual(x["policy"], x["policy"]), x, impl)


@every_loss
def test_transforms_are_refused_where_operators_stand_in(impl, name):
    """Under torch.compile and of subclasses: in silence the gradient would be 0."""
    x = make(batch=4)
    transformed = torch.compile(torch.func.grad(lambda p: LOSSES[name](p, x, impl)), backend="eager")
    with pytest.raises(Exception, match=f"{name}: expected backward"):  # as torch.compile wraps it
        transformed(x["policy"])
    torch._dynamo.reset()
    wrapped = x["policy"].as_subclass(type("Other", (torch.Tensor,), {}))
    with pytest.raises(RuntimeError, match=f"^{name}: expected backward"):
        torch.func.jvp(lambda p: LOSSES[name](p, x, impl), (wrapped,), (x["policy"],))


@every_loss
def test_gradients_in_batches_are_refused(impl, name):
    x = make(batch=4)
    policy = x["policy"].clone().requires_grad_()
    loss = LOSSES[name](policy, x, impl)
    with pytest.raises(RuntimeError, match=f"^{name}: expected backward.* for one gradient at a time"):
        torch.autograd.grad(loss, policy, torch.ones(2), is_grads_batched=True)


def test_transforms_of_the_steps_are_refused(impl):
    x = make(batch=4)
    latents = [x[name] for name in ("policy", "old", "ref_cond", "x0", "noise")]
    stats = measure(*latents, impl=impl)

    def centered(advantage):
        return center(stats, advantage, x["group"], impl=impl).c1.sum()

    with pytest.raises(RuntimeError, match=r"^center: expected backward"):
        torch.func.grad(centered)(x["advantage"])
    with pytest.raises(RuntimeError, match=r"^interpolate: expected backward"):
        torch.func.grad(lambda t: interpolate(t, torch.rand(4), x["noise"], impl=impl).sum())(x["x0"])


@every_loss
def test_second_order_gradients_are_refused_where_operators_stand_in(impl, name):
    x = make(batch=4)
    policy = x["policy"].clone().requires_grad_()
    with FlopCounterMode(display=False):
        loss = LOSSES[name](policy, x, impl)
        (gradient,) = torch.autograd.grad(loss, policy, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name}: expected to be differentiated once"):
            torch.autograd.grad(gradient.square().sum() + policy.sum(), policy)


def test_views_whose_memory_holds_the_negative(impl):
    """As the imaginary part of a conjugate does; the same for numbers of samples."""
    x = make(batch=4)

    def negative(value):
        view = torch.complex(value, -value).conj().imag
        assert view.is_neg() and torch.equal(view, value)
        return view

    def loss_of(**changed):
        inputs = x | changed
        policy = inputs["policy"].detach().requires_grad_()
        loss = LOSSES["crd_loss"](policy, inputs, impl)
        return loss.detach(), *torch.autograd.grad(loss, policy)

    loss, gradient = loss_of()
    for name in ("policy", "old", "ref_cond", "x0", "noise", "advantage"):
        found, its_gradient = loss_of(**{name: negative(x[name])})
        assert relative_error(found, loss) < 1e-12 and relative_error(its_gradient, gradient) < 1e-12
    latents = [x[name] for name in ("policy", "old", "ref_cond", "x0", "noise")]
    wanted = center(measure(*latents, impl=impl), x["advantage"], x["group"], impl=impl)
    latents[-1] = negative(latents[-1])
    found = center(measure(*latents, impl=impl), negative(x["advantage"]), x["group"], impl=impl)
    assert relative_error(found.c1, wanted.c1) < 1e-12


@every_loss
def test_what_was_made_in_inference_mode_is_taken(impl, name):
    x = make(batch=4)
    policy = x["policy"].clone().requires_grad_()
    LOSSES[name](policy, x, impl).backward()
    with torch.inference_mode():
        frozen = {key: value.clone() for key, value in x.items()}
    again = x["policy"].clone().requires_grad_()
    LOSSES[name](again, frozen, impl).backward()
    assert torch.equal(policy.grad, again.grad) and policy.grad.abs().max() > 0


@every_loss
def test_an_input_changed_before_the_backward_is_noticed(impl, name):
    x = make(batch=4)
    policy = x["policy"].clone().requires_grad_()
    loss = LOSSES[name](policy, x, impl)
    x["x0"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_loss
def test_a_loss_may_be_added_to_in_place(impl, name):
    x = make(batch=4)
    policy = x["policy"].clone().requires_grad_()
    loss = LOSSES[name](policy, x, impl)
    wanted = loss.detach() + 1
    loss += 1
    assert loss == wanted
    loss.backward()
    assert policy.grad.abs().max() > 0


def _permuted(x, order):
    """The same numbers with the inner dimensions laid out in another order."""
    back = [order.index(i) for i in range(len(order))]
    return x.permute(0, *(1 + i for i in order)).contiguous().permute(0, *(1 + i for i in back))


@pytest.mark.parametrize("rank", range(2, 9))
def test_permuted_latents_of_every_rank(impl, rank):
    """Each operand in another order, the policy and so the gradient too; new memory is NaN throughout."""
    shape = (3, 2, 4, 2, 3, 2, 2)[: rank - 1]
    inputs = make(batch=2, shape=shape, groups=(0,))
    orders = list(itertools.islice(itertools.permutations(range(rank - 1)), 0, 5040, 7))
    wanted = crd(inputs, guidance_scale=4.5)
    names = ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise")
    for first in range(0, len(orders), max(1, len(orders) // (2 if INTERPRETING else 5))):
        x = dict(inputs)
        for i, name in enumerate(names):
            x[name] = _permuted(inputs[name], orders[(first + 3 * i) % len(orders)])
            assert torch.equal(x[name], inputs[name])
        policy = x["policy"].detach().requires_grad_()
        assert policy.stride() == x["policy"].stride()
        tensors = (x["old"], x["ref_cond"], x["x0"], x["noise"], x["advantage"], x["group"])
        out = crd_loss(policy, *tensors, ref_uncond=x["ref_uncond"], guidance_scale=4.5, impl=impl)
        out.loss.backward()
        assert relative_error(out.loss, wanted["loss"]) < 1e-11
        assert relative_error(policy.grad, wanted["grad"]) < 1e-11
        stats = measure(policy, *tensors[:4], ref_uncond=x["ref_uncond"], guidance_scale=4.5, impl=impl)
        assert relative_error(stats.kl, wanted["kl"]) < 1e-11


def test_more_dimensions_than_can_be_described_are_refused(impl):
    if impl == "reference":
        pytest.skip("the definition takes any layout")
    x = torch.zeros(2, *[2] * 8).permute(0, *range(8, 0, -1))
    flat, zeros = torch.zeros(x.shape), torch.zeros(2)
    message = "at most 7 dimensions a sample, got 8"
    with pytest.raises(ValueError, match=message):
        measure(x, flat, flat, flat, flat, impl=impl)
    with pytest.raises(ValueError, match=message):
        velocity_grad(x, flat, flat, flat, type("C", (), {"c1": zeros, "c2": zeros}), impl=impl)
