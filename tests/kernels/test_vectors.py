"""The 48 reference cases, made by running the method's first author's implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from crd_kernels import crd_loss
from kernel_oracle import INTERPRETING, relative_error

VECTORS = Path(__file__).with_name("vectors")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_reference_vectors(impl, dtype, tolerance):
    arrays = np.load(VECTORS / "crd_reference.npz")
    cases = json.loads((VECTORS / "crd_reference.json").read_text())
    assert len(cases) == 48
    for case in cases[:: 5 if INTERPRETING else 1]:

        def array(key, name=case["name"]):
            return torch.from_numpy(arrays[f"{name}.{key}"]).to(torch.get_default_device())

        policy = array("policy").to(dtype).requires_grad_()
        temperature = case["centering_temperature"]
        out = crd_loss(
            policy,
            *(array(key).to(dtype) for key in ("old", "ref_cond", "x0", "noise")),
            array("advantage").to(dtype),
            torch.full((case["batch"],), 3),
            ref_uncond=array("ref_uncond").to(dtype),
            guidance_scale=case["guidance_scale"],
            beta=case["beta"],
            kl_beta=case["kl_beta"],
            kl_min=1e-4,
            adaptive_weighting=case["adaptive_weighting"],
            reward_adaptive_kl=case["reward_adaptive_kl"],
            loss_type=case["loss_type"],
            temperature=float("inf") if temperature == -1 else temperature,
            advantage_clip=case["advantage_clip"],
            impl=impl,
        )
        out.loss.backward()
        got = {
            "loss": out.loss,
            "policy_loss": out.policy_loss,
            "kl_loss": out.kl_loss,
            "kl_div": out.kl,
            "implicit_reward": out.implicit_reward,
            "grad_policy": policy.grad,
        }
        for key, value in got.items():
            assert relative_error(value, array(key)) < tolerance, (case["name"], key)
