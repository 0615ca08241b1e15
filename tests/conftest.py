"""The command line as a user calls it, and the order of the tests."""

import contextlib
import gc
import signal
import sys

import pytest

import crd_fast  # noqa: F401  before torch: how OpenMP's threads wait


def pytest_configure():
    """What tests start hears SIGINT, also where a script's `&` began these, which has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Quick tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_collection_finish():
    """What is imported by now stays, and a third of a second is spent on it by every full collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # what is left at the end is reported as leaked


@pytest.fixture
def inside(monkeypatch, capsys):
    """Runs `crd-fast` in this process, whose imports are done; returns exit code, output and errors."""

    import crd_fast.cli

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["crd-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            crd_fast.cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


@contextlib.contextmanager
def few_blocks():
    """The built-in model has the first and the last of its five blocks: for runs that nobody looks into.

    They take half the time. In this process alone; what is planned has them all.
    """
    from crd_fast.models.builtin import BuiltinModel

    load = BuiltinModel.load.__func__

    def without_the_middle(cls, *arguments, **options):
        model = load(cls, *arguments, **options)
        del model.transformer.transformer_blocks[1:-1]
        model.transformer.register_to_config(num_layers=2)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BuiltinModel, "load", classmethod(without_the_middle))
        yield


@pytest.fixture(scope="module")
def all_shallow():
    """`few_blocks` in a whole file, its fixtures too."""
    with few_blocks():
        yield


@pytest.fixture
def shallow():
    """`few_blocks` in one test."""
    with few_blocks():
        yield


@pytest.fixture(autouse=True)
def forgets_modules(tmp_path_factory):
    """A module that one test wrote and imported is not there in the next, which may write its like.

    What a fixture of several tests imported is.
    """
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(written):
            del sys.modules[name]
