"""Bad input: one line that names the argument, what was wanted and what came, from every implementation."""

import math

import pytest
import torch
from crd_kernels import center, crd_loss, measure, velocity_grad
from kernel_oracle import make

TENSORS = ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group")
WIDE = torch.zeros(8, 4, 6, 6)

BAD = [
    ({"old": torch.zeros(7, 4, 6, 5)}, ValueError, "old: expected shape (7, 4, 6, 6), got (7, 4, 6, 5)"),
    ({"ref_cond": WIDE}, ValueError, "ref_cond: expected shape (7, 4, 6, 6), got (8, 4, 6, 6)"),
    ({"ref_uncond": WIDE}, ValueError, "ref_uncond: expected shape (7, 4, 6, 6), got (8, 4, 6, 6)"),
    ({"x0": WIDE}, ValueError, "x0: expected shape (7, 4, 6, 6), got (8, 4, 6, 6)"),
    ({"noise": WIDE}, ValueError, "noise: expected shape (7, 4, 6, 6), got (8, 4, 6, 6)"),
    ({"policy": torch.zeros(7)}, ValueError, "policy: expected shape (batch, ...) of rank >= 2, got (7,)"),
    ({"policy": torch.zeros(0, 4)}, ValueError, "policy: expected at least one sample"),
    ({"policy": torch.zeros(7, 0)}, ValueError, "policy: expected at least one sample and one element"),
    ({"policy": torch.zeros(7, 4, 6, 6, dtype=torch.int64)}, TypeError, "policy: expected dtype"),
    ({"old": torch.zeros(7, 4, 6, 6, dtype=torch.bool)}, TypeError, "old: expected dtype"),
    ({"old": [1.0]}, TypeError, "old: expected a tensor, got list"),
    ({"old": None}, TypeError, "old: expected a tensor, got NoneType"),
    ({"noise": None}, TypeError, "noise: expected a tensor, got NoneType"),
    ({"x0": torch.zeros(7, 4, 6, 6, device="meta")}, ValueError, "x0: expected device cpu, got meta"),
    ({"advantage": torch.zeros(8)}, ValueError, "advantage: expected shape (7,), got (8,)"),
    ({"advantage": torch.zeros(7, 1)}, ValueError, "advantage: expected shape (7,), got (7, 1)"),
    ({"advantage": torch.zeros(7, dtype=torch.int64)}, TypeError, "advantage: expected dtype"),
    ({"advantage": [0.0] * 7}, TypeError, "advantage: expected a tensor, got list"),
    ({"advantage": None}, TypeError, "advantage: expected a tensor, got NoneType"),
    ({"group": None}, TypeError, "group: expected a tensor, got NoneType"),
    ({"group": torch.zeros(5, dtype=torch.int64)}, ValueError, "group: expected shape (7,), got (5,)"),
    ({"group": torch.zeros(7)}, TypeError, "group: expected dtype"),
    ({"guidance_scale": 4.5, "ref_uncond": None}, ValueError, "ref_uncond: expected a tensor because"),
    ({"guidance_scale": math.nan}, ValueError, "guidance_scale: expected a finite number, got nan"),
    ({"guidance_scale": "4"}, TypeError, "guidance_scale: expected a number, got str"),
    ({"ref_cond": None}, ValueError, "ref_cond: expected a tensor because ref_uncond is given"),
    ({"temperature": math.nan}, ValueError, "temperature: expected a finite number, got nan"),
    ({"temperature": -1.0}, ValueError, "temperature: expected a number >= 0, got -1.0"),
    ({"beta": 0.0}, ValueError, "beta: expected a number > 0, got 0.0"),
    ({"kl_min": 0.2}, ValueError, "kl_min: expected a number <= kl_beta = 0.1, got 0.2"),
    ({"kl_min": -0.1}, ValueError, "kl_min: expected a number >= 0, got -0.1"),
    ({"advantage_clip": 0.0}, ValueError, "advantage_clip: expected a number > 0, got 0.0"),
    ({"loss_type": "l1"}, ValueError, "loss_type: expected one of 'mse', 'bce', got 'l1'"),
    ({"centering": "rank"}, ValueError, "centering: expected one of 'prompt', 'batch', 'none', got 'rank'"),
    ({"kl_weight": torch.zeros(3)}, ValueError, "kl_weight: expected shape (7,), got (3,)"),
    ({"denominator": 0}, ValueError, "denominator: expected a number > 0, got 0"),
    ({"beta": True}, TypeError, "beta: expected a number, got bool"),
    ({"beta": torch.ones(())}, TypeError, "beta: expected a number, got Tensor"),
    ({"kl_beta": -1.0}, ValueError, "kl_beta: expected a number >= 0, got -1.0"),
    ({"mask": torch.ones(7, 4, 6)}, ValueError, "mask: expected a shape that broadcasts to (7, 4, 6, 6)"),
    ({"mask": torch.ones(7, 2, 6, 6)}, ValueError, "mask: expected a shape that broadcasts to (7, 4, 6, 6)"),
    ({"mask": torch.ones(7, 1, 6, 6, dtype=torch.int64)}, TypeError, "mask: expected dtype"),
    ({"adaptive_weighting": "false"}, ValueError, "adaptive_weighting: expected one of True, False, got"),
    ({"reward_adaptive_kl": 2}, ValueError, "reward_adaptive_kl: expected one of True, False, got 2"),
    ({"mask": [1.0]}, TypeError, "mask: expected a tensor, got list"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=[f"{next(iter(b[0]))}-{i}" for i, b in enumerate(BAD)]
)
def test_message(impl, change, error, message):
    keywords = make(dtype=torch.float32) | {"impl": impl} | change
    args = [keywords.pop(name) for name in TENSORS]
    with pytest.raises(error) as caught:
        crd_loss(*args, **keywords)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_was_right_before_is_checked_again(impl):
    """Checks are remembered by what the tensors look like; what else decides is looked at each time."""
    keywords = make(dtype=torch.float32) | {"impl": impl}
    args = [keywords.pop(name) for name in TENSORS]
    crd_loss(*args, **keywords | {"ref_uncond": None, "guidance_scale": 1.0})
    with pytest.raises(ValueError, match=r"ref_uncond: expected a tensor because guidance_scale is 2\.0"):
        crd_loss(*args, **keywords | {"ref_uncond": None, "guidance_scale": 2.0})
    crd_loss(*args, **keywords | {"beta": 1})
    with pytest.raises(TypeError, match="beta: expected a number, got bool"):
        crd_loss(*args, **keywords | {"beta": True})
    with pytest.raises(ValueError, match="impl: expected one of"):
        crd_loss(*args, **keywords | {"impl": "cuda"})


def test_kl_min_is_not_asked_for_where_nothing_reads_it(impl):
    keywords = make(dtype=torch.float32) | {"impl": impl, "kl_beta": 1e-5}
    args = [keywords.pop(name) for name in TENSORS]
    with pytest.raises(ValueError, match=r"kl_min: expected a number <= kl_beta = 1e-05, got 0\.0001"):
        crd_loss(*args, **keywords)
    assert crd_loss(*args, reward_adaptive_kl=False, **keywords).kl_loss > 0


def test_a_gradient_pass_that_found_other_tensors_spares_no_check(impl):
    """Hooks may give back what lies otherwise: its layout is looked at, and what it was made of is not."""
    keywords = make(dtype=torch.float32) | {"impl": impl}
    policy, *args = (keywords.pop(name) for name in TENSORS)
    with torch.autograd.graph.save_on_cpu():
        loss = crd_loss(policy.requires_grad_(), *args, **keywords).loss
    loss.backward()
    with pytest.raises(TypeError, match="advantage: expected a tensor, got NoneType"):
        crd_loss(policy, *args[:4], None, None, **keywords)


def test_the_steps_check_too(impl):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="coefficients: expected tensors c1 and c2, got NoneType"):
        velocity_grad(x, x, x, x, None, impl=impl)
    with pytest.raises(TypeError, match="stats: expected a Stats, got NoneType"):
        center(None, torch.zeros(2), torch.zeros(2).long(), impl=impl)
    with pytest.raises(ValueError, match=r"x0: expected shape \(2, 3\), got \(2, 4\)"):
        measure(x, x, x, torch.zeros(2, 4), x, impl=impl)

    class Coefficients:
        c1, c2 = torch.zeros(2), torch.zeros(3)

    with pytest.raises(ValueError, match=r"c2: expected shape \(2,\), got \(3,\)"):
        velocity_grad(x, x, x, x, Coefficients, impl=impl)


def test_unknown_implementation():
    x = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="impl: expected one of 'auto', 'triton', 'cpu', 'reference', got 'cuda'"
    ):
        measure(x, x, x, x, x, impl="cuda")


def test_triton_refuses_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="impl: expected tensors on a GPU for 'triton', got cpu"):
        measure(x, x, x, x, x, impl="triton")


def test_triton_refuses_without_triton(monkeypatch):
    from crd_kernels import dispatch

    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"impl: .* 'triton' without triton installed"):
        measure(x, x, x, x, x, impl="triton")
