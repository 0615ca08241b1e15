"""What a run says to trackers."""

import sys

import pytest
from accelerate import tracking

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.run.trackers import check_trackers
from crd_fast.train.trainer import Trainer
from tests.training.test_resuming import SETTINGS


class Recording(tracking.GeneralTracker):
    """A tracker as accelerate has them, of another package."""

    name, requires_logging_directory = "recording", True
    heard: list = []  # noqa: RUF012

    def __init__(self, project, logging_dir):
        super().__init__()
        self.heard += [("project", project), ("folder", logging_dir)]

    @property
    def tracker(self):
        return self

    def start(self):
        self.heard.append("start")

    def store_init_configuration(self, values):
        self.heard.append(("configuration", values["train"]["seed"]))

    def log(self, values, step=None, **kwargs):
        self.heard.append((step, sorted(values)))

    def log_images(self, values, step=None, **kwargs):
        self.heard.append((step, values["samples"].shape))

    def finish(self):
        self.heard.append("finish")


def test_a_tracker_of_accelerates_hears_what_metrics_say(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recording", Recording)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["recording"])
    recipe = load_recipe(
        "builtin", [*SETTINGS, "train.iterations=1", "train.trackers=[tensorboard, recording]"]
    )
    assert Trainer(recipe, tmp_path / "run").run()
    heard = Recording.heard
    assert heard[:4] == [
        *(
            ("project", "crd-fast"),
            ("folder", str(tmp_path / "run")),
            "start",
            ("configuration", recipe.train.seed),
        ),
    ]
    logged = {
        step: names
        for step, names in (entry for entry in heard if len(entry) == 2)
        if isinstance(names, list)
    }
    assert "reward_mean" in logged[1] and "iteration" not in logged[1]
    assert heard[-1] == "finish"
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_trackers_that_cannot_be_used(monkeypatch):
    with pytest.raises(UserError, match=r"train.trackers: unknown tracker 'wandbb', did you mean 'wandb'?"):
        check_trackers(["tensorboard", "wandbb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.trackers: wandb is not installed: pip install wandb"):
        check_trackers(["wandb"])
