"""On a GPU the host never waits: every loss and every launcher on tensors that only say they are there.

test_cuda_graph.py asks the same of a real GPU.
"""

import contextlib

import pytest
import torch
from crd_kernels import (
    awm_loss,
    center,
    crd_loss,
    diffusion_dpo_loss,
    dispatch,
    flow_matching_loss,
    implicit_reward,
    interpolate,
    launch,
    measure,
    nft_loss,
    passes,
    velocity_grad,
)
from kernel_oracle import INTERPRETING, crd, make, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend_gpu import OnGpu, pretend_gpu

pytestmark = pytest.mark.skipif(INTERPRETING, reason="pretends that Triton runs on a GPU")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    with pretend_gpu() as mode:
        yield mode


def on_gpu(batch=6, **keywords):
    x = {name: OnGpu(value) for name, value in make(batch=batch, dtype=torch.float32, **keywords).items()}
    x["policy"].requires_grad_()
    return x


def tensors(x, *names):
    return [x[name] for name in names]


CRD = ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group")
LOSSES = {
    "crd": lambda x: crd_loss(*tensors(x, *CRD), ref_uncond=x["ref_uncond"], guidance_scale=4.5).loss,
    "crd_temperature": lambda x: crd_loss(*tensors(x, *CRD), temperature=0.5, loss_type="bce").loss,
    "crd_batch": lambda x: (
        crd_loss(
            *tensors(x, *CRD), centering="batch", kl_weight=x["advantage"].abs(), reward_adaptive_kl=False
        ).loss
    ),
    "nft": lambda x: nft_loss(*tensors(x, *CRD[:6]), sigma=x["advantage"].sigmoid()).loss,
    "awm": lambda x: awm_loss(*tensors(x, "policy", "ref_cond", "x0", "noise", "advantage")).loss,
    "awm_clipped": lambda x: (
        awm_loss(
            *tensors(x, "policy", "ref_cond", "x0", "noise", "advantage"), old=x["old"], clip_range=0.2
        ).loss
    ),
    "dpo": lambda x: diffusion_dpo_loss(*tensors(x, "policy", "old", "x0", "noise")).loss,
    "flow_matching": lambda x: flow_matching_loss(*tensors(x, "policy", "x0", "noise")).loss,
    "implicit_reward": lambda x: implicit_reward(*tensors(x, "policy", "old", "x0", "noise")).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_never_make_the_host_wait(gpu, name):
    x = on_gpu()
    LOSSES[name](x).backward()
    assert gpu.syncs == []
    assert isinstance(x["policy"].grad, OnGpu)


def test_the_three_steps_never_make_the_host_wait(gpu):
    x = on_gpu()
    names = ("policy", "old", "ref_cond", "x0", "noise")
    stats = measure(*tensors(x, *names))
    parts = type(stats).cat([stats[0:2], stats[2:6]])
    coefficients = center(parts, x["advantage"], x["group"])
    gradient = velocity_grad(*tensors(x, "policy", "ref_cond", "x0", "noise"), coefficients)
    assert gpu.syncs == []
    wanted = crd({name: value.detach().inner for name, value in x.items()})
    assert relative_error(gradient.inner, wanted["grad"]) < 1e-5


METHODS = ["crd", "nft", "awm", "dpo", "flow_matching", "reward"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", ["given", "seeded"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_three_launches_and_nothing_for_the_host_to_wait_for(gpu, monkeypatch, method, noise, layout):
    """Down to the launch itself, which is left out: sums, everything on B scalars, gradient."""
    pytest.importorskip("triton")
    from crd_kernels.problem import Kind, Latents, Numbers, Scalars
    from crd_kernels.velocity import triton as velocity_kernels
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launched.append(self.__name__))
    monkeypatch.setattr(launch, "target", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x = on_gpu()
    policy, old, cond, uncond, x0, eps = (
        x[name].detach() for name in ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise")
    )
    if layout == "strided":
        cond, uncond = torch.cat([cond, uncond], -1).chunk(2, -1)
    eps, seed = (eps, None) if noise == "given" else (None, x["group"])
    latents = Latents(policy, old, cond, uncond, x0, eps, seed)
    scalars = Scalars(x["advantage"], x["group"], x["advantage"], x["advantage"])
    run = velocity_kernels.Passes(latents, scalars, Kind(method, old_term=method == "nft"))
    with counting() as ops:
        table, loss = run.forward(latents, scalars, Numbers())
        run.backward(latents if method == "nft" else latents._replace(old=None), table, loss, Numbers())
    assert launched == ["measure_kernel", "finish_kernel", "gradient_kernel"]
    assert gpu.syncs == []
    assert set(ops) <= ALLOCATIONS | VIEWS


# What launches nothing on a GPU.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}
VIEWS = {"unbind", "select", "detach", "view", "expand", "slice", "alias"}


@contextlib.contextmanager
def counting():
    """The names of the aten operators that run within."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names = []
    with Counting():
        yield names


@pytest.mark.parametrize("name", LOSSES)
def test_the_public_functions_run_nothing_but_three_launches(monkeypatch, name):
    """On their short way, which plain tensors take: these are on the CPU, and the launches left out."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launched.append(self.__name__))
    monkeypatch.setattr(launch, "target", lambda: None)
    monkeypatch.setattr(dispatch, "choose", lambda impl, device: "triton")
    monkeypatch.setattr(passes, "_PASSES", {})
    x = make(batch=6, dtype=torch.float32)
    x["policy"].requires_grad_()
    prepared = {key: x[key].sigmoid().abs() if key == "advantage" else x[key] for key in x}
    one = torch.ones(())
    run = LOSSES[name]
    run(prepared)
    launched.clear()
    with torch.autograd.profiler.profile() as profile:
        loss = run(prepared)
        loss.backward(one)
    assert launched == ["measure_kernel", "finish_kernel", "gradient_kernel"]
    names = {
        event.name.removeprefix("aten::")
        for event in profile.function_events
        if event.name.startswith("aten::")
    }
    assert names <= ALLOCATIONS | VIEWS | PREPARED


# Of the test's own making: the inputs that LOSSES computes.
PREPARED = {"sigmoid", "abs", "as_strided", "sum", "ones_like", "fill_", "set_"}


def test_interpolation_is_one_launch(gpu, monkeypatch):
    pytest.importorskip("triton")
    from crd_kernels.noise import triton as noise_kernels
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launched.append(self.__name__))
    monkeypatch.setattr(launch, "target", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x = on_gpu()
    noise_kernels.interpolate(x["x0"].detach(), x["advantage"], None, x["group"], torch.bfloat16)
    assert launched == ["interpolate_kernel"] and gpu.syncs == []


def test_interpolation_never_makes_the_host_wait(gpu):
    x = on_gpu()
    sigma = x["advantage"].sigmoid()
    assert isinstance(interpolate(x["x0"], sigma, seed=x["group"]), OnGpu)
    assert gpu.syncs == []


def test_waiting_would_be_seen(gpu):
    x = OnGpu(torch.ones(3))
    for wait in (
        lambda: x.sum().item(),
        lambda: bool((x > 0).all()),
        lambda: x.cpu(),
        lambda: x.cpu().tolist(),
        lambda: x[x > 0],
        lambda: torch.ones(3).to(x.device),
        lambda: x.nonzero(),
    ):
        gpu.syncs.clear()
        wait()
        assert gpu.syncs
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    gpu.syncs.clear()
    assert (x * 2 + 1).inner.tolist() == [3, 3, 3] and torch.zeros(2, device="cuda").device.type == "cuda"
    assert gpu.syncs == []
