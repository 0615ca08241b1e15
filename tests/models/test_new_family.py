"""A family is added with the files that the checklist names; what it lacks is listed first of all."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest

from crd_fast import models
from crd_fast.models import FAMILIES, family, load_model
from crd_fast.plan.planner import Planner
from crd_fast.run.metrics import read_metrics
from crd_fast.train.trainer import Trainer

CHECKLIST = Path(models.__file__).with_name("README.md")
TOY = """
from diffusers import StableDiffusion3Pipeline

from crd_fast.models.pipeline import PipelineModel


class ToyPipeline(StableDiffusion3Pipeline):
    pass


class ToyModel(PipelineModel):
    name = "Toy"
    pipeline = ToyPipeline
    lora_targets = ("attn.to_q",)
    text_length = 16

    def _size_multiple(self):
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def _steps(self, steps):
        return {"num_inference_steps": steps}

    def _encode(self, pipe, prompt):
        states, _, pooled, _ = pipe.encode_prompt([prompt], None, None, do_classifier_free_guidance=False)
        return {"states": states[0, : self.text_length], "pooled": pooled[0]}

    def velocity(self, x, sigma, embeddings):
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=embeddings["states"].to(self.dtype),
            pooled_projections=embeddings["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
"""
ROW = ("toy", "ToyModel", "Toy")


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Adds a family: its file and its line in the table. Returns what was touched."""

    def of(source, name):
        (tmp_path / "more").mkdir(exist_ok=True)
        (tmp_path / "more" / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "more")])
        monkeypatch.setitem(FAMILIES, "ToyPipeline", (name, *ROW[1:]))
        return [f"crd_fast/models/{name}.py", "crd_fast/models/__init__.py"]

    return of


def test_a_family_is_the_files_of_the_checklist(add, tiny, recipe, tmp_path, monkeypatch):
    touched = add(TOY, "toy")
    asked = re.findall(r"^- \[ \] `(.*?)`", CHECKLIST.read_text(encoding="utf-8"), re.MULTILINE)
    assert [path.replace("<family>", "toy") for path in asked] == touched
    folder = shutil.copytree(tiny("sd3"), tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    monkeypatch.setattr(diffusers, "ToyPipeline", family("ToyPipeline").pipeline, raising=False)
    settings = recipe(folder, "train.iterations=1")
    assert Trainer(settings, tmp_path / "run").run()
    (record,) = read_metrics(tmp_path / "run")
    assert record["grad_norm"] > 0 and record["kl_loss"] > 0
    assert Planner(settings).plan(1, 1).peak > 0


def test_everything_that_is_missing_is_listed_before_anything_is_loaded(add, tiny, recipe, tmp_path):
    add(
        "from crd_fast.models.pipeline import PipelineModel\n\nclass ToyModel(PipelineModel):\n    pass\n",
        "half",
    )
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    lacks = "name, pipeline, lora_targets, text_length, _encode, velocity"
    with pytest.raises(TypeError, match=f"crd_fast.models.half.ToyModel lacks: {lacks}$"):
        load_model(recipe(folder))


def test_a_family_in_another_pipelines_row_is_seen(monkeypatch):
    monkeypatch.setitem(FAMILIES, "FluxPipeline", FAMILIES["StableDiffusion3Pipeline"])
    with pytest.raises(TypeError, match="pipeline = FluxPipeline, got StableDiffusion3Pipeline"):
        family("FluxPipeline")


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_every_family_is_whole(pipeline):
    assert family(pipeline).pipeline.__name__ == pipeline
