"""Live bytes against torch's own tracker."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from crd_fast.plan.live_bytes import LiveBytes
from tests.plan.conftest import Real


def test_peak_is_that_of_torchs_tracker():
    network = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
    x = torch.randn(32, 64)
    live, tracker = LiveBytes(), MemTracker()
    tracker.track_external(network, x)
    live.add([list(network.parameters()), x])
    with tracker, live:
        network(x).square().mean().backward()
    expected = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert live.peaks[""].bytes == expected


def test_a_real_update_by_torchs_profiler(recipe):
    """Which sees what the allocator does, kernels' own temporaries among it."""
    real = Real(recipe("builtin", "train.precision=fp32"))
    latents = torch.randn(12, 3, 32, 32)
    before = real.live.total
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiler, real.live, real.live.in_phase("update"):
        real.update(latents, 4)
    counted = real.live.peaks["update"].bytes - before
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=start) if event.name() == "[memory]"]
    assert counted == pytest.approx(max(itertools.accumulate(changes)), rel=0.05)


def start(event):
    return event.start_ns()


def test_views_count_once_and_what_is_freed_no_more():
    live = LiveBytes()
    with live, live.in_part("a"):
        x = torch.zeros(1000)
        assert live.live["a"] == 4000
        y, z = x.view(10, 100), x[3:]
        x.add_(1)
        assert live.live["a"] == live.total == 4000
        with live.in_part("b"):
            w = y + 1
        del x, y
        assert live.live["a"] == 4000  # z holds it
        del z
        assert dict(live.live) == {"a": 0, "b": 4000}
    del w
    assert live.total == 0 and live.peaks[""].bytes == 8000


def test_moving_and_releasing():
    live, x, y = LiveBytes(), torch.zeros(10), torch.zeros(20)
    live.move([x, {"y": y}], "weights")
    assert live.live["weights"] == 120
    live.move(y[:3], "other")
    assert live.live["weights"] == 40 and live.live["other"] == 80
    live.release(x)
    assert live.total == 80 and live.peaks[""].bytes == 120


def test_what_is_on_the_host_is_not_counted_when_it_is_written():
    live, x = LiveBytes(), torch.zeros(10)
    live.add(x)
    live.ignore(x)
    with live:
        x.copy_(torch.ones(10))
        assert live.total == 0
    assert live.peaks[""].bytes == 40


def test_the_wide_copy_of_a_4_bit_weight_is_added():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(256, 512, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(512, 256), requires_grad=False, quant_type="nf4", module=layer
    )
    layer = layer.to("cpu").train()
    live, x = LiveBytes(), torch.randn(1, 256)
    live.add(layer.weight)
    with live, torch.no_grad():
        layer(x)
    assert live.peaks[""].bytes - live.live["workspace"] == 4 * (512 * 256 + 512)
