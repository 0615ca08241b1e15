"""A weight per element: means over what it leaves, in every op, from every implementation."""

import pytest
import torch
from crd_kernels import center, crd_loss, flow_matching_loss, implicit_reward, measure, velocity_grad
from kernel_oracle import INTERPRETING, crd, make, relative_error

LATENTS = ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise")
NAMES = ("old", "ref_cond", "x0", "noise", "advantage", "group")


def packed(dtype=torch.float64, tokens=90, batch=7):
    """Packed tokens, and a mask (B, tokens, 1) that leaves another number of them of every sample."""
    inputs = make(batch=batch, shape=(tokens, 6), dtype=dtype)
    lengths = torch.tensor([tokens, 1, 33, 7, tokens - 1, 64, 2])[:batch]
    mask = torch.arange(tokens)[None, :, None] < lengths[:, None, None]
    return inputs, mask


def masks(inputs):
    """By name: padding, a region in some channels, weights of any size, one mask for all samples."""
    shape = inputs["policy"].shape
    random = torch.Generator("cpu").manual_seed(1)
    weights = torch.rand(shape, generator=random, device="cpu").to(inputs["policy"].device)
    return {
        "padding": torch.arange(shape[1], device=weights.device)[None, :, None] < 50,
        "region": weights > 0.4,
        "weights": 3 * weights,
        "bf16": (weights[..., :1] * 4).round().bfloat16(),
        "bytes": (weights[:, :1] > 0.3).to(torch.uint8).expand(-1, shape[1], -1),
        "one for all": weights[:1] > 0.5,
    }


def run(inputs, impl, mask, **settings):
    policy = inputs["policy"].clone().requires_grad_()
    tensors = [inputs[name] for name in NAMES]
    settings = {"ref_uncond": inputs["ref_uncond"], "guidance_scale": 4.5} | settings
    out = crd_loss(policy, *tensors, mask=mask, impl=impl, **settings)
    out.loss.backward()
    return out, policy.grad


@pytest.mark.parametrize("name", ["padding", "region", "weights", "bf16", "bytes", "one for all"])
@pytest.mark.parametrize("adaptive_weighting", [True, False])
def test_against_the_oracle(impl, name, adaptive_weighting):
    inputs, _ = packed()
    mask = masks(inputs)[name]
    settings = {"adaptive_weighting": adaptive_weighting, "temperature": 0.7}
    out, gradient = run(inputs, impl, mask, **settings)
    wanted = crd(inputs, guidance_scale=4.5, mask=mask, **settings)
    for key in ("loss", "policy_loss", "kl_loss", "implicit_reward", "kl", "old_kl", "old_deviation"):
        assert relative_error(getattr(out, key), wanted[key]) < 1e-11, key
    assert relative_error(gradient, wanted["grad"]) < 1e-11
    assert not gradient[mask.expand(gradient.shape) == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_padded_does_not_matter(impl, dtype):
    """Samples of their own length each, one by one, against all of them padded with NaN."""
    inputs, mask = packed(dtype)
    wide = {name: torch.where(mask, inputs[name], torch.nan) for name in LATENTS}
    out, gradient = run(inputs | wide, impl, mask)
    stats, alone = [], []
    lengths = mask.sum((1, 2)).tolist()
    guided = {"guidance_scale": 4.5, "impl": impl}
    for i, length in enumerate(lengths):
        one = {name: inputs[name][i : i + 1, :length] for name in LATENTS}
        tensors = [one[name] for name in ("policy", "old", "ref_cond", "x0", "noise")]
        stats.append(measure(*tensors, ref_uncond=one["ref_uncond"], **guided))
        alone.append((tensors, one["ref_uncond"]))
    for key in ("implicit_reward", "kl", "old_kl", "old_deviation"):
        wanted = torch.cat([getattr(part, key) for part in stats])
        # a reward is the difference of two sums near 1, which round by the width of the processor's vectors
        assert (getattr(out, key) - wanted).abs().max() < 2e-6 * (1 + wanted.abs().max())
    table = torch.cat([part.table for part in stats], 1)
    joined = type(stats[0])(table, 540)
    found = center(joined, inputs["advantage"], inputs["group"], impl=impl)
    assert relative_error(out.loss, found.loss) < 1e-5
    for i, (tensors, uncond) in enumerate(alone):
        policy, _, cond, x0, noise = tensors
        wanted = velocity_grad(policy, cond, x0, noise, found[i], ref_uncond=uncond, **guided)
        assert relative_error(gradient[i : i + 1, : lengths[i]], wanted) < torch.finfo(dtype).eps + 1e-5
    assert not gradient[~mask.expand(gradient.shape)].any()


def test_a_mask_of_ones_is_no_mask(impl):
    inputs, mask = packed(torch.float32)
    (out, gradient), (plain, wanted) = run(inputs, impl, torch.ones_like(mask)), run(inputs, impl, None)
    assert relative_error(out.loss, plain.loss) < 1e-6 and relative_error(gradient, wanted) < 1e-5


def test_a_sample_without_any_weight_is_nan(impl):
    inputs, mask = packed()
    mask[2] = False
    out, _ = run(inputs, impl, mask)
    assert out.loss.isnan() and out.kl[2].isnan() and not out.kl[[0, 1, 3]].isnan().any()


@pytest.mark.skipif(INTERPRETING, reason="a seed takes the same way with and without a mask")
def test_a_mask_with_noise_by_seed(impl):
    from crd_kernels.noise.philox import normal

    inputs, mask = packed(torch.float32)
    seed = torch.arange(7)
    inputs["noise"] = normal(seed, inputs["x0"].shape)
    given, gradient = run(inputs, impl, mask)
    inputs["noise"] = None
    policy = inputs["policy"].clone().requires_grad_()
    tensors = [inputs[name] for name in NAMES]
    guided = {"ref_uncond": inputs["ref_uncond"], "guidance_scale": 4.5}
    out = crd_loss(policy, *tensors, seed=seed, mask=mask, impl=impl, **guided)
    out.loss.backward()
    assert relative_error(out.loss, given.loss) < 1e-5 and relative_error(policy.grad, gradient) < 1e-4


def test_the_steps_and_the_rewards_take_it_too(impl):
    inputs, mask = packed()
    out, gradient = run(inputs, impl, mask)
    guided = {"ref_uncond": inputs["ref_uncond"], "guidance_scale": 4.5, "mask": mask, "impl": impl}
    tensors = [inputs[name] for name in ("policy", *NAMES[:4])]
    stats = measure(*tensors, **guided)
    assert torch.equal(stats.elements, 6.0 * mask.sum((1, 2)))
    found = center(stats, inputs["advantage"], inputs["group"], impl=impl)
    assert found.loss == out.loss
    again = velocity_grad(*(inputs[name] for name in ("policy", "ref_cond", "x0", "noise")), found, **guided)
    assert torch.equal(again, gradient)
    policy = inputs["policy"].clone().requires_grad_()
    reward = implicit_reward(policy, inputs["old"], inputs["x0"], inputs["noise"], mask=mask, impl=impl)
    reward.sum().backward()
    assert (
        relative_error(reward, stats.implicit_reward) < 1e-12
    )  # fewer sums: another loop, rounded otherwise
    assert not policy.grad[~mask.expand(policy.shape)].any() and policy.grad.any()
    error = flow_matching_loss(policy, inputs["x0"], inputs["noise"], mask=mask, impl=impl).error
    assert relative_error(error, stats.policy_error) < 1e-12
