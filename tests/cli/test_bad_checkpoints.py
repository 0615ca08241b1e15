"""Checkpoints that are damaged or of another model: one line on standard error, exit code 2, nothing lost."""

import json
import shutil

import pytest

from crd_fast.weights import durable
from tests.cli.conftest import SMALL, assert_refused

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one iteration."""
    folder = tmp_path_factory.mktemp("finished")
    from crd_fast.config import build_recipe, load_recipe
    from crd_fast.train.trainer import Trainer

    (folder / "small.yaml").write_text(SMALL)
    recipe = load_recipe(folder / "small.yaml", ["train.iterations=1", "evaluate.every=0"])
    trainer = Trainer(build_recipe(recipe.model_dump()), folder / "run")
    trainer.run()
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_truncated_weights(run, copied):
    path = copied / "checkpoints" / "iteration-000001" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(run("eval", copied), "training.safetensors", "missing or damaged")
    before = (copied / "metrics.jsonl").read_bytes()
    assert_refused(run("train", "--resume", copied, "--max-iterations", 2), "missing or damaged")
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_model(run, copied):
    path = copied / "checkpoints" / "iteration-000001" / "state.json"
    state = json.loads(path.read_text())
    state["model"]["parameters"] += 1
    path.write_text(json.dumps(state))
    durable.seal(path.parent)
    assert_refused(run("eval", copied), "a checkpoint of another model")
    assert_refused(run("train", "--resume", copied, "--max-iterations", 2), "a checkpoint of another model")


def test_a_checkpoint_with_another_adapter(run, copied):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("lora_rank: 4", "lora_rank: 8"))
    assert_refused(run("train", "--resume", copied, "--max-iterations", 2), "model.lora_rank 4 -> 8")


def test_damaged_state(run, copied):
    (copied / "checkpoints" / "iteration-000001" / "state.json").write_text("{")
    assert_refused(run("eval", copied), "state.json", "missing or damaged")


def test_nan_weights_end_the_run_and_keep_its_checkpoints(finished, tmp_path):
    from crd_fast.config import load_recipe
    from crd_fast.errors import UserError
    from crd_fast.train.trainer import Trainer

    copied = shutil.copytree(finished, tmp_path / "copy")
    recipe = load_recipe(copied / "config.yaml", ["train.iterations=2"])
    trainer = Trainer(recipe, copied, resume=True)
    trainer.weights.trained()[0].data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"weights/policy.*expected finite numbers, got NaN"):
        trainer.run()
    assert (copied / "checkpoints" / "iteration-000001" / "state.json").exists()
    assert not (copied / "checkpoints" / "iteration-000002").exists()
