"""The CRD loss on the CPU, forward and backward: time, share of the copy bandwidth, peak extra memory.

    python -m pytest benchmarks/test_crd_loss_cpu.py --benchmark-json out.json

Bytes that must move, an element: 6 reads, then 5 reads and 1 write.
"""

import crd_machine
import pytest
import torch
from crd_providers import PROVIDERS, inputs, oracle

SHAPE, SAMPLES = (16, 64, 64), 24  # SD3.5-medium at 512 x 512
PASSES = 6 + 5 + 1


@pytest.fixture(scope="module")
def made():
    return inputs(SAMPLES, SHAPE)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_and_backward(benchmark, made, provider):
    function = PROVIDERS[provider]

    def run():
        made["policy"].grad = None
        loss = function(**made)
        loss.backward()
        return loss.detach()

    loss, gradient = oracle(made)
    got = run().double()
    close = abs(got - loss) <= 1e-2 * abs(loss)
    close &= (made["policy"].grad.double() - gradient).norm() <= 2e-2 * gradient.norm()
    assert close, f"{provider}: wrong result, no speed reported"

    made["policy"].grad = None
    extra = crd_machine.peak_extra_bytes(run)
    benchmark.pedantic(run, rounds=15, warmup_rounds=3)
    nbytes = PASSES * made["policy"].nbytes
    floor = nbytes / crd_machine.copy_bandwidth(made["policy"].nbytes * 6)
    benchmark.extra_info |= {
        "bytes": nbytes,
        "fraction_of_copy_bandwidth": floor / benchmark.stats.stats.median,
        "peak_extra_bytes": extra,
        "latent_bytes": made["policy"].nbytes,
        "threads": torch.get_num_threads(),
    }
    if provider == "ours" and extra is not None:
        assert extra <= made["policy"].nbytes + 16 * 2**20
