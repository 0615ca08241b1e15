"""The Triton path under CUDA graphs: captured once, replayed on new inputs, equal to the eager call."""

import pytest
import torch
from crd_kernels import crd_loss
from kernel_oracle import make

LATENTS = ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_captured_loss_and_gradient_replay_on_new_inputs():
    def given(seed):
        made = make(batch=6, shape=(4, 500), dtype=torch.bfloat16, groups=(0, 1), seed=seed)
        return {name: made[name].cuda() for name in (*LATENTS, "advantage", "group")}

    def loss_and_gradient(x):
        policy = x["policy"].detach().requires_grad_()
        loss = crd_loss(
            policy,
            *(x[name] for name in ("old", "ref_cond", "x0", "noise", "advantage", "group")),
            ref_uncond=x["ref_uncond"],
            guidance_scale=4.5,
            impl="triton",
        ).loss
        return loss.detach(), torch.autograd.grad(loss, policy)[0]

    static, new = given(0), given(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels outside the capture
        loss_and_gradient(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(static)
    for name, value in new.items():
        static[name].copy_(value)
    graph.replay()
    for got, wanted in zip(captured, loss_and_gradient(new)):
        assert torch.equal(got, wanted)
