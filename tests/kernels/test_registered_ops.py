"""The ops as torch sees them: opcheck, torch.compile without graph breaks, FakeTensor."""

import pytest
import torch
from crd_kernels import center, crd_loss, measure, velocity_grad
from crd_kernels.centering.ops import center_op
from crd_kernels.velocity import ops
from kernel_oracle import make
from torch._subclasses.fake_tensor import FakeTensorMode

TENSORS = ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(impl, dtype):
    x = make(batch=3, shape=(5, 7), dtype=dtype)
    policy, old, cond, uncond, x0, noise = (
        x[name] for name in ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise")
    )
    c1, c2 = torch.randn(2, 3)
    loss = torch.tensor(1.5)
    torch.library.opcheck(ops.measure_op, (policy, old, cond, uncond, x0, noise, None, 4.5, True, 0.0, impl))
    torch.library.opcheck(ops.measure_op, (policy, old, None, None, x0, noise, None, 1.0, False, 0.5, impl))
    torch.library.opcheck(
        ops.velocity_grad_op, (policy, old, cond, uncond, x0, noise, None, c1, c2, c1, 4.5, impl)
    )
    torch.library.opcheck(
        ops.attach_gradient_op,
        (loss, policy.clone().requires_grad_(), None, cond, None, x0, noise, None, c1, c2, None, 1.0, impl),
    )


def test_opcheck_of_centering():
    rows = torch.rand(4, 5)
    ids = torch.tensor([3, 3, -1, 3, -1])
    settings = (None, [1.0, 0.1, 1e-4, 5.0, 0.5], True, "bce")
    torch.library.opcheck(center_op, (*rows.unbind(0), torch.randn(5), ids, None, 12, *settings))


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


def test_fake_tensors(impl):
    with FakeTensorMode():
        policy, *others = (torch.empty(6, 4, 8, 8, dtype=torch.bfloat16) for _ in range(5))
        policy.requires_grad_()
        out = crd_loss(policy, *others, torch.empty(6), torch.empty(6, dtype=torch.int64), impl=impl)
        out.loss.backward()
        assert (
            out.kl.shape == (6,) and policy.grad.shape == policy.shape and policy.grad.dtype == policy.dtype
        )
