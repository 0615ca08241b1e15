"""Every public function under torch.compile with Inductor, and exported.

test_compiled.py runs this in processes of its own, since what goes wrong there may end the process.

    python compiled_ops.py NAME ...
"""

import sys
from pathlib import Path

import crd_kernels as ck
import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parent))

from kernel_oracle import make

LATENTS = ("old", "ref_cond", "x0", "noise")


def crd(p, x, beta=1.0, guidance_scale=4.5, kl_beta=0.1, temperature=0.5):
    settings = {
        "beta": beta,
        "guidance_scale": guidance_scale,
        "kl_beta": kl_beta,
        "temperature": temperature,
    }
    tensors = [x[name] for name in (*LATENTS, "advantage", "group")]
    out = ck.crd_loss(p, *tensors, ref_uncond=x["ref_uncond"], **settings)
    return out.loss, out.kl, out.policy_loss


def nft(p, x, beta=1.0, kl_beta=0.1):
    tensors = [x[name] for name in (*LATENTS, "advantage")]
    out = ck.nft_loss(p, *tensors, x["advantage"].sigmoid(), beta=beta, kl_beta=kl_beta)
    return out.loss, out.error


def awm(p, x, kl_beta=0.1, advantage_clip=5.0, clip_range=0.2):
    tensors = [x[name] for name in ("ref_cond", "x0", "noise", "advantage")]
    settings = {"kl_beta": kl_beta, "advantage_clip": advantage_clip, "clip_range": clip_range}
    return (ck.awm_loss(p, *tensors, old=x["old"], **settings).loss,)


def dpo(p, x, beta=5.0):
    return (ck.diffusion_dpo_loss(p, x["old"], x["x0"], x["noise"], beta=beta).loss,)


def flow_matching(p, x):
    return (ck.flow_matching_loss(p, x["x0"], x["noise"], mask=x["old"] > 0).loss,)


def implicit_reward(p, x):
    return (ck.implicit_reward(p, x["old"], x["x0"], x["noise"]).square().sum(),)


def steps(p, x, beta=1.0, guidance_scale=4.5, temperature=0.5):
    guided = {"ref_uncond": x["ref_uncond"], "guidance_scale": guidance_scale}
    stats = ck.measure(p.detach(), *(x[name] for name in LATENTS), **guided)
    found = ck.center(stats, x["advantage"], x["group"], beta=beta, temperature=temperature)
    gradient = ck.velocity_grad(p.detach(), x["ref_cond"], x["x0"], x["noise"], found, **guided)
    return (p * gradient).sum(), found.loss


def interpolate(p, x):
    return (p * ck.interpolate(x["x0"], x["advantage"].sigmoid(), seed=x["group"])).sum(), x["x0"]


FUNCTIONS = {f.__name__: f for f in (crd, nft, awm, dpo, flow_matching, implicit_reward, steps, interpolate)}
SETTINGS = {  # name -> first value
    "crd": {"beta": 0.5, "guidance_scale": 2.0, "kl_beta": 0.5, "temperature": 0.5},
    "nft": {"beta": 0.5, "kl_beta": 0.5},
    "awm": {"kl_beta": 0.5, "advantage_clip": 0.5, "clip_range": 0.5},
    "dpo": {"beta": 0.5},
    "steps": {"beta": 0.5, "guidance_scale": 2.0, "temperature": 0.5},
}


def run(function, x, **settings):
    """What comes out, and the gradient. The policy is an operator's result, as in a model."""
    policy = x["policy"].clone().requires_grad_()
    found = function(policy * 1, x, **settings)
    found[0].backward()
    return [value.detach() for value in found] + [policy.grad]


def same(got, wanted, how):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda text: f"{how}: {text}")


def inputs(batch=4, seed=0):
    return make(batch=batch, shape=(3, 5), dtype=torch.float32, groups=(0, 1), seed=seed)


def main(name):
    function = FUNCTIONS[name]

    def broken(p, x, **settings):  # the rest of this frame, and what it calls, runs under Dynamo's eye
        torch._dynamo.graph_break()
        return function(p, x, **settings)

    # one graph without a break is what compiling it as it comes makes as well
    for how, options in (("fullgraph", {"fullgraph": True}), ("dynamic", {"dynamic": True})):
        torch._dynamo.reset()
        compiled = torch.compile(function, **options)
        for seed, batch in enumerate((4, 4, 6) if how == "dynamic" else (4, 4)):
            x = inputs(batch, seed)
            same(run(compiled, x), run(function, x), how)
    torch._dynamo.reset()
    compiled = torch.compile(broken)
    for seed in range(3):
        x = inputs(seed=seed)
        same(run(compiled, x), run(function, x), "a broken graph")

    x = inputs()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    # all settings change at every step: one that is compiled in would be seen
    for step in range(10 if name in SETTINGS else 0):
        values = {setting: start + step / 8 for setting, start in SETTINGS[name].items()}
        same(run(compiled, x, **values), run(function, x, **values), f"{values}")
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 2, f"{graphs} graphs for 10 values of each setting"

    class Module(torch.nn.Module):
        def forward(self, policy, others):
            return function(policy, others)

    exported = torch.export.export(Module(), (x["policy"], x)).module()
    same(exported(x["policy"], x), function(x["policy"], x), "export")
    print(name, flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
