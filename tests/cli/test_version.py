"""One version, in the package, in what is installed and on the command line."""

from importlib import metadata

import crd_fast


def test_version(process):
    assert process("--version") == (0, f"{crd_fast.__version__}\n", "")
    assert metadata.version("crd-fast") == crd_fast.__version__


def test_help_is_still_about_training(inside):
    code, out, _ = inside("--help")
    assert code == 0 and "black-box reward" in out and "--version" in out and "serve-reward" in out


def test_recipes_that_ship_are_listed(inside):
    code, out, _ = inside("recipes")
    assert code == 0 and all(name in out for name in ("builtin-lora", "sd3.5-medium-24gb", "z-image-paper"))
    assert "Stable Diffusion 3.5 medium on a card of 24 GB" in " ".join(out.split())
