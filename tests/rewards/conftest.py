"""A user's rewards, and a recipe that names them; a server of rewards."""

import sys

import pytest

from tests.cli.conftest import SMALL

MINE = '''
import threading
import time

calls = []
devices = []


def redness(images, prompts, metadata):
    """The example of the README."""
    calls.append((threading.current_thread().name, list(prompts)))
    return [float(image[..., 0].mean()) / 255 for image in images]


def scaled(images, prompts, metadata, scale=1.0):
    return [scale * value for value in redness(images, prompts, metadata)]


class Thing:
    def __init__(self, sharpness: float, mode="fast"):
        if mode not in ("fast", "slow"):
            raise ValueError(f"mode: expected fast or slow, got {mode!r}")
        self.sharpness = sharpness

    def setup(self, device):
        devices.append(device)

    def score(self, images, prompts, metadata):
        return [self.sharpness] * len(images)


class Patient:
    """Has a timeout of its own."""

    def __init__(self, timeout=3.0):
        self.timeout = timeout

    def score(self, images, prompts, metadata):
        time.sleep(self.timeout)
        return [self.timeout] * len(images)


def slow(images, prompts, metadata):
    time.sleep(60)


def third_time(images, prompts, metadata):
    calls.append(None)
    if len(calls) > 5:
        raise RuntimeError("no more")
    return [float(i) for i in range(len(images))]


def fails(images, prompts, metadata):
    raise RuntimeError("broken")


constant = 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's module of rewards in the current folder."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda: sys.modules["mine"]
    sys.modules.pop("mine", None)


def assert_refused(result, *words):
    code, _, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    for word in words:
        assert word in err


def recipe_file(folder, rewards, name="small.yaml"):
    path = folder / name
    path.write_text(SMALL + rewards)
    return path


@pytest.fixture(scope="module")
def served_rewards(tmp_path_factory):
    """The module behind a server, importable."""
    from tests.rewards.serving import REWARDS

    folder = tmp_path_factory.mktemp("rewards")
    (folder / "served_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import served_rewards

        yield served_rewards


@pytest.fixture(scope="module")
def address(served_rewards):
    """Of a server that stays up for all tests of a file."""
    from tests.rewards.serving import serving, wait_until_ready

    with serving("Brightness", bytes=200_000, images=8, pixels=8 * 64 * 64) as address:
        wait_until_ready(address)
        yield address


@pytest.fixture
def token(monkeypatch):
    from crd_fast.rewards import http as client
    from tests.rewards.serving import TOKEN

    monkeypatch.setenv("TOKEN", TOKEN)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
