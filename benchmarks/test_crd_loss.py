"""The CRD loss as people write it against ours: forward, backward, both; time, bandwidth, peak extra memory.

Bytes that must move, an element: forward 6 reads, backward 5 reads and 1 write. A provider whose result is
wrong fails its gate and gets no figure.
"""

import crd_machine
import pytest
from conftest import SHAPES
from crd_providers import PROVIDERS, inputs, oracle

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def made(workload, device):
    name, samples = workload
    tensors = inputs(samples, SHAPES[name], device=device)
    return tensors, oracle(tensors)


@pytest.fixture
def gate(made):
    """Refuses a provider whose loss or gradient is further from float64 than bf16 rounding explains."""
    tensors, (loss, gradient) = made

    def check(provider):
        tensors["policy"].grad = None
        got = PROVIDERS[provider](**tensors)
        got.backward()
        got = got.detach().double()
        close = bool(abs(got - loss) <= 1e-2 * abs(loss))
        close &= bool((tensors["policy"].grad.double() - gradient).norm() <= 2e-2 * gradient.norm())
        tensors["policy"].grad = None
        assert close, f"{provider}: wrong result, no speed reported"

    return check


@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_crd_loss(benchmark, timed, gate, made, workload, provider, phase, device):
    gate(provider)
    tensors, _ = made
    function, policy = PROVIDERS[provider], tensors["policy"]

    def both():
        policy.grad = None
        function(**tensors).backward()

    def prepare():
        policy.grad = None
        return (function(**tensors),), {}

    passes = {"forward": 6, "backward": 6, "both": 12}[phase]
    if phase == "both":
        extra = crd_machine.peak_extra_bytes(both, device)
        benchmark.extra_info["peak_extra_bytes"] = extra
        if provider == "ours" and extra is not None:
            assert extra <= policy.nbytes + 16 * MEGABYTE
    run, setup = {
        "forward": (lambda: function(**tensors), None),
        "backward": (lambda loss: loss.backward(), prepare),
        "both": (both, None),
    }[phase]
    timed(phase, run, passes * policy.nbytes, setup)
    benchmark.extra_info |= {
        "op": "crd_loss",
        "provider": provider,
        "shape": workload[0],
        "samples": workload[1],
        "latent_bytes": policy.nbytes,
    }
