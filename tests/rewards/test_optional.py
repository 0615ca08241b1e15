"""Judges that may be left out: wherever it is found that a package of theirs is not installed."""

import sys

import pytest

from crd_fast.errors import MissingPackage, UserError
from crd_fast.rewards import Rewards

FUNCTION = "def score(images, prompts, metadata):\n    return [0.0] * len(images)\n"
CLASS = """
class Judge:
    def {method}:
        import package_that_is_not_there
    def score(self, images, prompts, metadata):
        return [0.0] * len(images)
"""
FILES = {
    "at_its_top.py:score": "import package_that_is_not_there\n" + FUNCTION,
    "when_made.py:Judge": CLASS.format(method="__init__(self)"),
    "when_set_up.py:Judge": CLASS.format(method="setup(self, device)"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the user's files are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name, text in {**FILES, "fine.py:score": FUNCTION}.items():
        (tmp_path / name.partition(":")[0]).write_text(text)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.partition(".")[0], None)


@pytest.mark.parametrize("workers", [{}, {"workers": 1}])
@pytest.mark.parametrize("name", FILES)
def test_one_without_its_package_is_left_out(caplog, name, workers):
    judges = Rewards({name: {"optional": True, **workers}, "fine.py:score": {}}, device="cpu", judges=True)
    assert list(judges.weights) == ["fine.py:score"]
    (line,) = caplog.messages
    assert line.startswith(f"judge {name} is left out: ") and "package_that_is_not_there" in line
    with pytest.raises(MissingPackage, match="package_that_is_not_there") as error:
        Rewards({name: workers}, device="cpu", judges=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fien.py:score", "fien:score", "fine:scor"])
def test_one_that_is_named_wrongly_is_not(name):
    with pytest.raises(UserError) as error:
        Rewards({name: {"optional": True}}, device="cpu", judges=True)
    assert not isinstance(error.value, MissingPackage)
