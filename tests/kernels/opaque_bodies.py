"""python opaque_bodies.py BACKEND [older]: calls every operator where Dynamo would compile its body.

The operators and their arguments come from a graph of the public functions. Each is then called by a frame
that Dynamo leaves alone, between two graphs: what such a frame calls is compiled, unless it is opaque.
"older" stands for a torch without the private function that marks code.
"""

import sys
from pathlib import Path

import torch

BACKEND, *OLDER = sys.argv[1:]
private = torch._C._dynamo.eval_frame
mark = private.set_code_exec_strategy
if OLDER:
    del private.set_code_exec_strategy
import crd_kernels as k  # noqa: E402

private.set_code_exec_strategy = mark
from torch._dynamo.convert_frame import input_codes  # noqa: E402

PACKAGE = str(Path(k.__file__).parent)
calls = {}


class Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the arguments of our operators."""

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", None) == "crd_kernels":
            kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            calls[target] = (kept, kwargs)
        return super().call_function(target, args, kwargs)


def public_functions(policy, old, reference, x0, noise, advantage, group):
    fixed = policy.detach()
    stats = k.measure(fixed, old, reference, x0, noise)
    gradient = k.velocity_grad(fixed, reference, x0, noise, k.center(stats, advantage, group))
    mixed = k.interpolate(x0, torch.rand(len(policy)), noise)
    return k.crd_loss(policy, old, reference, x0, noise, advantage, group).loss, gradient, mixed


@torch.compiler.disable(recursive=False)
def between_graphs(op, args, kwargs):
    return op(*args, **kwargs)


def caller(x, op, args, kwargs):
    y = x + 1
    result = between_graphs(op, args, kwargs)
    return y * 2, result


torch.manual_seed(0)
policy = torch.randn(4, 3, 8, 8, requires_grad=True)
others = [*torch.randn(4, *policy.shape), torch.randn(4), torch.zeros(4, dtype=torch.long)]
backend = lambda graph, inputs: Recorder(graph).run  # noqa: E731
torch.compile(public_functions, backend=backend, fullgraph=True)(policy, *others)
# the gradient of a loss stands in no graph of a forward; it takes what carries the gradient, and one
(loss, *latents, table, numbers, kind, impl), _ = calls[torch.ops.crd_kernels.attach_gradient.default]
calls[torch.ops.crd_kernels.loss_grad.default] = ([*latents, table, loss, numbers, kind, impl], {})
registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("crd_kernels::")}
recorded = {op.name() for op in calls}
assert recorded == registered, f"operators without a call here: {sorted(registered - recorded)}"

for op, (args, kwargs) in calls.items():
    torch.compiler.reset()
    input_codes.seen.clear()
    wanted = op(*args, **kwargs)
    for _ in range(2):
        _, got = torch.compile(caller, backend=BACKEND)(torch.ones(2), op, args, kwargs)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    seen = [code for reference in input_codes.seen if (code := reference())]
    assert any(code.co_name == "caller" for code in seen), "Dynamo compiled nothing at all"
    bodies = [
        f"{code.co_name} in {code.co_filename}" for code in seen if code.co_filename.startswith(PACKAGE)
    ]
    assert not bodies, f"{op}: Dynamo compiled {bodies}"
print("opaque:", *sorted(name.partition("::")[2] for name in recorded))
