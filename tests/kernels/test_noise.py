"""Noise by seed: the generator's own numbers, the same from every implementation, and in every pass."""

import pytest
import torch
from crd_kernels import crd_loss, interpolate, measure
from crd_kernels.noise import philox
from kernel_oracle import make, relative_error


def seeds():
    return torch.tensor([0, 1, -1, 2**62 + 12345, 42])


def test_known_answers():
    """Random123's published test vectors for Philox 4x32-10."""
    zero = torch.zeros((), dtype=torch.int64)
    words = [int(word) for word in philox.philox(zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("shape", [(1,), (63,), (4, 5, 7), (16387,)])
def test_implementations_make_the_same_noise(impl, shape):
    zeros = torch.zeros(5, *shape)
    got = interpolate(zeros, torch.ones(5), seed=seeds(), impl=impl)
    assert relative_error(got, philox.normal(seeds(), zeros.shape)) < 1e-6


def test_noise_is_standard_normal_and_independent(impl):
    seed = torch.arange(40)
    noise = interpolate(torch.zeros(40, 10000), torch.ones(40), seed=seed, impl=impl).double().cpu()
    assert abs(noise.mean()) < 5e-3 and abs(noise.var() - 1) < 1e-2
    assert abs((noise**3).mean()) < 2e-2 and abs((noise**4).mean() - 3) < 5e-2
    assert (torch.corrcoef(noise) - torch.eye(40)).abs().max() < 5e-2
    lanes = noise.view(-1, 4)
    assert (torch.corrcoef(lanes.T) - torch.eye(4)).abs().max() < 2e-2


def test_noise_does_not_depend_on_the_batch(impl):
    zeros = torch.zeros(5, 1009)
    whole = interpolate(zeros, torch.ones(5), seed=seeds(), impl=impl)
    alone = interpolate(zeros[3:4], torch.ones(1), seed=seeds()[3:4], impl=impl)
    if impl == "reference":  # torch's logarithm may round by the place in the batch
        assert relative_error(alone, whole[3:4]) < 4 * torch.finfo(torch.float32).eps
    else:
        assert torch.equal(whole[3:4], alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_interpolate(impl, dtype):
    x0, noise = torch.randn(2, 5, 3, 7, dtype=torch.float64).to(dtype)
    sigma = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.99])
    wanted = (1 - sigma.view(5, 1, 1)) * x0.double() + sigma.view(5, 1, 1) * noise.double()
    got = interpolate(x0, sigma, noise, impl=impl)
    # two products and their sum in float32, and what the result is rounded to
    rounding = max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float32).eps)
    assert got.dtype == dtype and relative_error(got, wanted) < rounding
    assert interpolate(x0, sigma, noise, dtype=torch.float16, impl=impl).dtype == torch.float16


def test_what_interpolate_returns_is_contiguous(impl):
    x0, noise = torch.randn(2, 5, 3, 7).transpose(2, 3)
    assert interpolate(x0, torch.rand(5), noise, impl=impl).stride() == (21, 3, 1)


def test_every_pass_uses_the_noise_of_the_seed(impl):
    inputs = make(batch=5, shape=(3, 5, 7), dtype=torch.float32, groups=(0, 0, 1))
    inputs["noise"] = philox.normal(seeds(), inputs["x0"].shape)
    results = []
    for keywords in ({"noise": inputs["noise"]}, {"noise": None, "seed": seeds()}):
        policy = inputs["policy"].clone().requires_grad_()
        tensors = {name: inputs[name] for name in ("old", "ref_cond", "x0", "advantage", "group")}
        out = crd_loss(
            policy, **tensors, ref_uncond=inputs["ref_uncond"], guidance_scale=2.0, impl=impl, **keywords
        )
        out.loss.backward()
        results.append((out.loss.detach(), out.implicit_reward, policy.grad))
    for given, made in zip(*results):
        assert relative_error(made, given) < 3e-5


def test_equal_policy_and_old_reward_exactly_zero_with_a_seed(impl):
    x = torch.randn(5, 1009)
    reward = measure(x, x.clone(), None, x, None, seed=seeds(), impl=impl).implicit_reward
    assert torch.equal(reward, torch.zeros(5))


def test_bad_seeds(impl):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="seed: expected None because noise is given"):
        measure(x, x, x, x, x, seed=torch.zeros(2, dtype=torch.int64), impl=impl)
    with pytest.raises(ValueError, match=r"seed: expected shape \(2,\), got \(3,\)"):
        measure(x, x, x, x, None, seed=torch.zeros(3, dtype=torch.int64), impl=impl)
    with pytest.raises(TypeError, match="seed: expected dtype int64, got float32"):
        interpolate(x, torch.ones(2), seed=torch.zeros(2), impl=impl)
    with pytest.raises(TypeError, match="noise: expected a tensor, got NoneType"):
        interpolate(x, torch.ones(2), impl=impl)
    with pytest.raises(ValueError, match=r"sigma: expected shape \(2,\), got \(1,\)"):
        interpolate(x, torch.ones(1), x, impl=impl)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        interpolate(x, torch.ones(2), x, dtype=torch.int32, impl=impl)
