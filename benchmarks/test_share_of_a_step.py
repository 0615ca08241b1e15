"""How much of a training step the loss is, so that nobody over-reads its speed-up.

One group of 8 through a small SD3 transformer (diffusers' own class): three forwards without gradient, one
with, the loss, the backward through the model. Larger models make the loss's share smaller still.
"""

import pytest
import torch
from crd_providers import LOSSES, Provider

CRD = LOSSES["crd"]


@pytest.fixture(scope="module")
def step(device):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=256,
        caption_projection_dim=384,
        pooled_projection_dim=256,
        out_channels=16,
        pos_embed_max_size=32,
    ).to(device)
    x = torch.randn(8, 16, 32, 32, device=device)
    condition = {
        "encoder_hidden_states": torch.randn(8, 32, 256, device=device),
        "pooled_projections": torch.randn(8, 256, device=device),
        "timestep": torch.full((8,), 500.0, device=device),
        "return_dict": False,
    }
    constant = {
        "advantage": torch.randn(8, device=device),
        "group": torch.zeros(8, dtype=torch.int64, device=device),
        "x0": x,
        "noise": torch.randn_like(x),
    }

    def predict():
        return model(hidden_states=x, **condition)[0]

    def run(name):
        with torch.no_grad():
            frozen = {branch: predict() for branch in ("old", "ref_cond", "ref_uncond")}
        Provider(CRD, name, {"policy": predict(), **frozen, **constant}).forward().backward()

    with torch.no_grad():
        ready = {name: predict() for name in ("old", "ref_cond", "ref_uncond")}
        ready["policy"] = predict()
    return run, ready | constant


@pytest.mark.parametrize("name", ["eager, float64 weights", "ours"])
@pytest.mark.parametrize("part", ["loss", "step"])
def test_share_of_a_step(benchmark, timed, step, name, part):
    run, ready = step
    policy = ready["policy"].requires_grad_()
    alone = Provider(CRD, name, ready).both
    once = alone if part == "loss" else lambda: run(name)
    timed(part, once, CRD.bytes(policy.nbytes), rounds=3, warmup_rounds=1)
    benchmark.extra_info |= {
        "op": "share",
        "provider": name,
        "shape": "SD3, 4 layers, 384 wide",
        "samples": 8,
    }
