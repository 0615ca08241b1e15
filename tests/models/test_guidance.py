"""Guidance by the empty prompt of a model that has its own in its weights."""

import re
import shutil

import pytest

from crd_fast.models import load_model
from crd_fast.train.guidance import guided_twice
from crd_fast.train.trainer import Trainer

OFF, NO_ANCHOR = ("loss.guidance_scale=1",), ("loss.kl_beta=0", "loss.kl_min=0")
EVALUATED = ("evaluate.every=1",)


@pytest.mark.parametrize(
    "family, name, overrides, said",
    [
        ("flux", "flux", (), "loss.guidance_scale 4.5: this FLUX.1 has its guidance distilled into it"),
        ("flux", "flux", OFF, None),
        ("flux", "flux", NO_ANCHOR, None),
        ("flux", "flux", (*OFF, "rollout.guidance_scale=2"), "rollout.guidance_scale 2: this FLUX.1"),
        ("flux", "flux", (*OFF, *EVALUATED, "evaluate.drift=2"), "evaluate.drift 2: this FLUX.1"),
        ("flux", "flux", (*EVALUATED, *NO_ANCHOR), "loss.guidance_scale 4.5: this FLUX.1"),
        ("flux", "flux", (*EVALUATED, *NO_ANCHOR, "evaluate.guided_base=false"), None),
        ("sd3", "sd3", (), None),
        (
            "sd3",
            "sd3.5-Large-Turbo",
            (),
            r"loss.guidance_scale 4.5: this Stable Diffusion 3 is, by its name \(Turbo\), used",
        ),
        ("sd3", "sd3.5-Large-Turbo", OFF, None),
    ],
)
def test_it_is_warned_of(tiny, recipe, tmp_path, family, name, overrides, said):
    folder = shutil.copytree(tiny(family), tmp_path / name)
    wanted = recipe(folder, *overrides)
    found = list(guided_twice(load_model(wanted), wanted))
    assert len(found) == (said is not None)
    if said is not None:
        assert re.search(f"^warning: {said}", found[0])


def test_before_anything_is_trained(tiny, recipe, tmp_path, caplog):
    Trainer(recipe(tiny("flux")), tmp_path / "run")
    assert caplog.text.count("has its guidance distilled into it") == 1
    Trainer(recipe(tiny("flux"), *OFF), tmp_path / "other")
    assert caplog.text.count("has its guidance distilled into it") == 1
