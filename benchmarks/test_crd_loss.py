"""The CRD loss as people write it beside ours: forward, backward, both; time, bandwidth, peak extra memory.

Bytes that must move, an element: forward 6 reads, backward 5 reads and 1 write. A provider whose result is
wrong, or a torch.compile that did not compile, fails its check and gets no figure.
"""

import crd_machine
import pytest
from crd_providers import LOSSES, Provider, oracle

MEGABYTE = 2**20
CRD = LOSSES["crd"]


@pytest.fixture(scope="module")
def wanted(tensors):
    return oracle(CRD, tensors)


@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", ["ours", "reference", *CRD.baselines()])
def test_crd_loss(benchmark, timed, tensors, wanted, workload, name, phase, device):
    provider, latent = Provider(CRD, name, tensors), tensors["policy"].nbytes
    if phase == "both":
        provider.check(wanted)  # compiles, which takes memory of its own
        extra = crd_machine.peak_extra_bytes(provider.both, device)
        benchmark.extra_info["peak_extra_bytes"] = extra
        if name == "ours" and extra is not None:
            assert extra <= latent + 16 * MEGABYTE
    forward, backward = CRD.reads
    run, passes, setup = {
        "forward": (provider.forward, forward, None),
        "backward": (provider.backward, backward + 1, lambda: ((provider.forward(),), {})),
        "both": (provider.both, forward + backward + 1, None),
    }[phase]
    timed(phase, run, passes * latent, setup, check=lambda: provider.check(wanted))
    benchmark.extra_info |= {
        "op": "crd_loss",
        "provider": name,
        "shape": workload[0],
        "samples": workload[1],
        "latent_bytes": latent,
    }
