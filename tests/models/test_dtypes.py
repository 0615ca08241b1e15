"""Dtypes inside the networks under the rules of CUDA's autocast, made to happen on the CPU."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from crd_fast.models import load_model
from crd_fast.plan.cuda_autocast import RESULT_FLOAT32, TO_FLOAT32, cuda_autocast
from crd_fast.train.forwards import autocast
from crd_fast.weights.make import make_weights
from tests.models.conftest import ALL, PROMPTS, RESOLUTION

BASES = {
    "none": ("model.quantization=none",),
    "int8": ("model.quantization=int8",),
    "nf4": ("model.quantization=nf4",),
    "full": ("model.method=full", "train.learning_rate=1e-5"),  # weights in float32
}


@contextlib.contextmanager
def cudas_rules():
    with cuda_autocast(), autocast("cpu", "bf16"):
        yield


def dtypes(values):
    return [value.dtype for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@torch.no_grad()
def velocity(model):
    x = torch.randn(2, *model.latent_shape(RESOLUTION), generator=torch.Generator().manual_seed(3))
    return model.velocity(x, torch.tensor([0.9, 0.3]), model.encode_prompts(PROMPTS))


def watched(model):
    """What each module of the network returns from now on: its dtypes by the module's name."""
    found = {}

    def keep(name):
        return lambda module, args, output: found.update({name.replace(".base_layer", ""): dtypes(output)})

    for name, module in model.transformer.named_modules():
        if "lora_" not in name:
            module.register_forward_hook(keep(name))
    return found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", ALL)
def test_attention_gets_half_precision(tiny, recipe, monkeypatch, family, base):
    attention, seen = F.scaled_dot_product_attention, []

    def spy(query, key, value, *args, **kwargs):
        seen.append(dtypes((query, key, value)))
        return attention(query, key, value, *args, **kwargs)

    settings = recipe(tiny(family), *BASES[base], "train.precision=bf16")
    model = load_model(settings, PROMPTS)
    make_weights(model, settings)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with cudas_rules():
        velocity(model)
    assert seen and seen == [[torch.bfloat16] * 3] * len(seen)


@pytest.mark.parametrize("base", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ALL)
def test_nothing_goes_wide(tiny, recipe, family, base):
    """Every module returns what it returns without autocast, as a pipeline runs it; so does the whole."""
    settings = recipe(tiny(family), *BASES[base], "train.precision=bf16")
    model = load_model(settings, PROMPTS)
    expected = watched(model)
    plain = velocity(model)
    assert dtypes(plain) == [torch.bfloat16]

    model = load_model(settings, PROMPTS)
    make_weights(model, settings)
    found = watched(model)
    with cudas_rules():
        result = velocity(model)
    assert found == expected
    torch.testing.assert_close(result, plain, rtol=0, atol=0)


def test_the_rules_are_cudas():
    """Those of torch's own header, without the losses and the resizing of pictures."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    for macro, ours in (("AT_FORALL_FP32", TO_FLOAT32), ("AT_FORALL_FP32_SET_OPT_DTYPE", RESULT_FLOAT32)):
        listed = header.read_text().split(f"#define {macro}(_)")[1].split("\n\n")[0]
        theirs = {
            line.strip(" \\").removeprefix("_(").removesuffix(")").replace(", ", ".")
            for line in listed.splitlines()
            if line.strip().startswith("_(")
        }
        kept = {name for name in theirs if "loss" not in name and "upsample" not in name}
        kept -= {"kl_div", "binary_cross_entropy_with_logits"}
        assert kept <= set(ours)
        assert set(ours) - kept <= {"norm.Scalar", "norm.ScalarOpt_dim"}  # under a macro of their own


def test_the_rules_end_with_their_context():
    x = torch.randn(2, 8, dtype=torch.bfloat16)

    def results():
        with autocast("cpu", "bf16"):
            return dtypes([F.layer_norm(x, (8,)), F.rms_norm(x, (8,)), x**2, x.softmax(-1), x.sum(), x @ x.T])

    before = results()
    with cuda_autocast():
        assert results() == [torch.float32] * 5 + [torch.bfloat16]
        assert F.layer_norm(x, (8,)).dtype == torch.bfloat16  # where there is no autocast
    assert results() == before == [torch.bfloat16] * 6
