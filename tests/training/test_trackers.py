"""What a run says to trackers."""

import json
import struct

import pytest
from accelerate import tracking

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.run.metrics import read_metrics
from crd_fast.run.trackers import check_trackers
from crd_fast.train.trainer import Trainer
from tests.training.short_runs import SETTINGS


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


class Away(Recording):
    """Whose server does not answer in iteration 1, and not at the end."""

    name, heard = "away", []

    def log(self, values, step=None, **kwargs):
        if step == 1:
            raise ConnectionError("no route\nto host")
        super().log(values, step)

    def finish(self):
        raise RuntimeError


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, caplog):
    """The others hear all of it, and so does it as soon as it works again."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "away", Away)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recording", Recording)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["away", "recording"])
    Recording.heard.clear()
    recipe = load_recipe("builtin", [*SETTINGS, "train.iterations=2", "train.trackers=[away, recording]"])
    assert Trainer(recipe, tmp_path / "run").run()
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [0, 1, 2]

    def steps(heard):
        return [entry[0] for entry in heard if len(entry) == 2 and isinstance(entry[1], list)]

    assert steps(Away.heard) == [0, 2] and steps(Recording.heard) == [0, 1, 2]
    warned = [text for text in caplog.messages if "tracker" in text]
    assert warned == ["warning: tracker away: no route to host", "warning: tracker away: RuntimeError"]


def records(file):
    """The messages in an offline run of W&B: a log as LevelDB's, blocks of 32 KiB, 7 bytes before a part."""
    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, part = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield message
            message = b""


def history(file):
    """The values that it has kept, by step."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = {}
    for data in records(file):
        record = messages.Record.FromString(data)
        if record.HasField("history"):
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found.setdefault(record.history.step.num, {}).update(values)
    return found


def test_weights_and_biases_has_the_metrics_and_pictures(tmp_path, monkeypatch):
    """Offline, in the run's folder, whatever folder the command is called from."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe("builtin", [*SETTINGS, "train.iterations=2", "train.trackers=[wandb]"])
    assert Trainer(recipe, tmp_path / "run").run()
    wandb.teardown()  # as at the process's end: then all is written
    assert not list((tmp_path / "elsewhere").iterdir())
    (file,) = (tmp_path / "run" / "wandb").rglob("run-*.wandb")
    found = history(file)
    for record in read_metrics(tmp_path / "run"):
        kept = found[record["iteration"]]
        for name, value in record.items():
            assert name == "iteration" or json.loads(kept[name]) == pytest.approx(value), name
        assert any(name.startswith("samples") for name in kept) == ("eval/reward_mean" in record), kept.keys()
    pictures = list((tmp_path / "run" / "wandb").rglob("*.png"))
    assert len(pictures) == sum("eval/reward_mean" in record for record in read_metrics(tmp_path / "run")) > 0


def test_trackers_that_cannot_be_used(monkeypatch):
    with pytest.raises(UserError, match=r"train.trackers: unknown tracker 'wandbb', did you mean 'wandb'?"):
        check_trackers(["tensorboard", "wandbb"])
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"train.trackers: wandb is not installed: pip install wandb"):
        check_trackers(["wandb"])
