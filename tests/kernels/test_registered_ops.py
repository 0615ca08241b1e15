"""The ops as torch sees them: opcheck, torch.compile without graph breaks, FakeTensor."""

import pytest
import torch
from crd_kernels import awm_coefficients, center, crd_loss, measure, nft_coefficients, velocity_grad
from crd_kernels.finish.ops import finish_op, loss_op
from crd_kernels.problem import Kind, Numbers
from crd_kernels.velocity import ops
from crd_kernels.velocity.stats import ROWS
from kernel_oracle import make
from torch._subclasses.fake_tensor import FakeTensorMode

TENSORS = ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group")


NUMBERS = torch.tensor(Numbers(guidance_scale=4.5, kl_beta=0.1), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(impl, dtype):
    x = make(batch=3, shape=(5, 7), dtype=dtype, groups=(3, 3, -1))
    policy, old, cond, uncond, x0, noise = (
        x[name] for name in ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise")
    )
    mask = torch.rand(3, 5, 1).expand(3, 5, 7)
    latents = (policy, old, cond, uncond, x0, noise, None, mask)
    c1, c2 = torch.randn(2, 3)
    kind = str(Kind("crd", adaptive_weighting=True))
    check = torch.library.opcheck
    check(ops.measure_op, (*latents, NUMBERS, str(Kind("measure")), impl))
    check(
        ops.measure_op, (policy, old, None, None, x0, noise, None, None, NUMBERS, str(Kind("measure")), impl)
    )
    check(ops.velocity_grad_op, (*latents, c1, c2, c1, NUMBERS, impl))
    scalars = (x["advantage"], x["group"], None, None, None)
    check(loss_op, (*latents, *scalars, NUMBERS, kind, impl))
    table, loss = loss_op(*latents, *scalars, NUMBERS, kind, impl)
    check(finish_op, (table[:ROWS], *scalars, NUMBERS, kind, impl))
    check(ops.loss_grad_op, (*latents, table, loss, NUMBERS, kind, impl))
    given = (policy.clone().requires_grad_(), *latents[1:])
    check(ops.attach_gradient_op, (loss, *given, table, NUMBERS, kind, impl))


def test_compiles_without_a_graph_break(impl):
    x = make(batch=4, shape=(3, 5), dtype=torch.float32, groups=(0, 1))

    def loss(policy):
        out = crd_loss(
            policy * 2,
            *(x[name] for name in TENSORS[1:]),
            ref_uncond=x["ref_uncond"],
            guidance_scale=3.0,
            impl=impl,
        )
        return out.loss, out.kl

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        policy = x["policy"].clone().requires_grad_()
        value, kl = function(policy)
        (2 * value).backward()
        results.append((value.detach(), kl, policy.grad))
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)


def test_three_steps_compile_without_a_graph_break(impl):
    x = make(batch=4, shape=(3, 5), dtype=torch.float32, groups=(0, 1))

    def gradient(policy):
        stats = measure(policy, *(x[name] for name in TENSORS[1:5]), impl=impl)
        coefficients = center(stats, x["advantage"], x["group"], temperature=0.5, loss_type="bce", impl=impl)
        return velocity_grad(policy, *(x[name] for name in TENSORS[2:5]), coefficients[0:4], impl=impl)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(x["policy"]), compiled(x["policy"]))


def test_the_steps_of_other_losses_compile_without_a_graph_break(impl):
    x = make(batch=4, shape=(3, 5), dtype=torch.float32, groups=(0, 1))
    sigma = x["advantage"].sigmoid()

    def gradients(policy):
        others, nft = [x[name] for name in TENSORS[1:5]], {"old": x["old"], "impl": impl}
        stats = measure(policy, *others, mix=0.5, impl=impl)
        found = nft_coefficients(stats, x["advantage"], sigma, beta=0.5, impl=impl)
        first = velocity_grad(policy, *others[1:], found[0:4], **nft)
        stats = measure(policy, *others, adaptive_weighting=False, impl=impl)
        found = awm_coefficients(
            stats, x["advantage"], sigma=sigma, weighting="t", off_policy=True, clip_range=0.1, impl=impl
        )
        return first, velocity_grad(policy, *others[1:], found, impl=impl)

    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(gradients(x["policy"]), compiled(x["policy"])):
        assert torch.equal(eager, traced)


def test_fake_tensors(impl):
    with FakeTensorMode():
        policy, *others = (torch.empty(6, 4, 8, 8, dtype=torch.bfloat16) for _ in range(5))
        policy.requires_grad_()
        out = crd_loss(policy, *others, torch.empty(6), torch.empty(6, dtype=torch.int64), impl=impl)
        out.loss.backward()
        assert (
            out.kl.shape == (6,) and policy.grad.shape == policy.shape and policy.grad.dtype == policy.dtype
        )
