"""One version, in the package, in what is installed and on the command line."""

from importlib import metadata

import crd_fast


def test_version(process):
    assert process("--version") == (0, f"{crd_fast.__version__}\n", "")
    assert metadata.version("crd-fast") == crd_fast.__version__


def test_help_is_still_about_training(inside):
    code, out, _ = inside("--help")
    assert code == 0 and "black-box reward" in out and "--version" in out and "serve-reward" in out
