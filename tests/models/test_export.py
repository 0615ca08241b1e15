"""What `crd-fast export` writes is what diffusers and ComfyUI load, and never over anything."""

import dataclasses
import json
import re
import tempfile

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.run.scores import read_scores, scores_path
from crd_fast.train.export import Trained, write_comfyui, write_fused
from crd_fast.train.inference import Source, evaluated
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from tests.models.conftest import (
    ALL,
    PROMPTS,
    RESOLUTION,
    SAMPLE_PROMPTS,
    SEEDS,
    STEPS,
    as_short,
    by_pipeline,
    by_rollout,
    load_pipeline,
    short,
)

SETTINGS = ("evaluate.every=1", "evaluate.steps=2", "checkpoint.every=1")


@pytest.fixture
def run_of(tiny, recipe, tmp_path):
    """A run of two iterations with evaluations; a reward in it cannot be imported any more."""

    def train(family, *overrides):
        folder = tmp_path / "run"
        assert Trainer(recipe(tiny(family), *SETTINGS, *overrides), folder).run()
        return folder

    return train


def exported(inside, source, to, out, *options):
    code, said, errors = inside("export", source, "--to", to, "--out", out, *options)
    assert code == 0, errors
    assert [path.name for path in out.parent.glob(f".{out.name}*")] == []
    return said


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_lora(inside, run_of, tiny, tmp_path, family):
    """diffusers takes the folder and, as ComfyUI reads it, the file; the fused pipeline draws the same."""
    run, length = run_of(family, short(family), "evaluate.every=0"), as_short(family)
    source = run / "checkpoints" / "iteration-000002"
    pipe = load_pipeline(tiny(family))
    untrained, _ = by_pipeline(pipe, family, **length)
    pipe.load_lora_weights(source / "diffusers")
    expected, _ = by_pipeline(pipe, family, **length)
    pipe.unload_lora_weights()
    assert (expected - untrained).abs().max() > 1e-3

    exported(inside, source, "diffusers", tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(by_pipeline(pipe, family, **length)[0], expected, rtol=0, atol=0)
    pipe.unload_lora_weights()

    exported(inside, run, "comfyui", tmp_path / "lora.safetensors", "--checkpoint", "2")
    state = load_file(tmp_path / "lora.safetensors")
    assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", key) for key in state)
    pipe.load_lora_weights(state)  # tensors alone, as ComfyUI has them
    torch.testing.assert_close(by_pipeline(pipe, family, **length)[0], expected, rtol=1e-5, atol=1e-5)

    exported(inside, run, "fused", tmp_path / "deep" / "fused", "--checkpoint", "newest")
    fused = load_pipeline(tmp_path / "deep" / "fused")
    assert not any("lora" in name for name, _ in fused.transformer.named_parameters())
    torch.testing.assert_close(by_pipeline(fused, family, **length)[0], expected, rtol=1e-4, atol=1e-4)


def test_fused_keeps_the_dtype_of_each_component(inside, run_of, tiny, tmp_path):
    folder = tmp_path / "base"
    pipe = DiffusionPipeline.from_pretrained(tiny("sd3"))
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder_3.to(torch.float16)
    pipe.save_pretrained(folder)
    run = run_of("sd3")
    exported(inside, run, "fused", tmp_path / "fused", "--model", folder)
    dtypes = {name: value.dtype for name, value in load_stored(tmp_path / "fused").items()}
    assert dtypes == {"transformer": torch.bfloat16, "text_encoder_3": torch.float16, "vae": torch.float32}


def load_stored(folder):
    """The largest tensor of some components, as it is in the file."""
    found = {}
    for name in ("transformer", "text_encoder_3", "vae"):
        (file,) = (folder / name).glob("*.safetensors")
        found[name] = max(load_file(file).values(), key=torch.numel)
    return found


def test_all_weights(inside, run_of, tiny, tmp_path):
    run = run_of("sd3", "model.method=full", "train.learning_rate=0.001")
    trained = load_file(
        checkpoint.find(run, "newest") / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    exported(inside, run, "diffusers", tmp_path / "transformer", "--checkpoint", "newest")
    exported(inside, run, "fused", tmp_path / "fused", "--checkpoint", "newest")
    exported(inside, run, "hub", tmp_path / "hub", "--checkpoint", "newest")
    for folder in ("transformer", "fused/transformer", "hub/transformer"):
        state = load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        assert state.keys() == trained.keys()
        assert all(torch.equal(value, trained[key]) for key, value in state.items())
    load_pipeline(tmp_path / "fused")
    assert str(tmp_path) not in (tmp_path / "hub" / "transformer" / "config.json").read_text()
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model_relation == "finetune" and "SD3Transformer2DModel" in card.text
    code, _, errors = inside("export", run, "--to", "comfyui", "--out", tmp_path / "a.safetensors")
    assert code == 2 and "expected a run with model.method lora" in errors


def python_of(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_a_folder_for_the_hub(inside, run_of, tiny, tmp_path):
    """Of a checkpoint before the last: nothing of its card is from later."""
    run = run_of("sd3", "eval_rewards={colorfulness: {}}", "evaluate.samples_per_prompt=2")
    said = exported(inside, run, "hub", tmp_path / "my-lora", "--base-model", "org/base", "--checkpoint", "1")
    assert "hf upload YOUR-NAME/my-lora" in said
    text = (tmp_path / "my-lora" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["library_name"] == "diffusers"
    assert data["license"] == "other" and "was not found beside its weights" in text
    assert "lora" in data["tags"] and data["base_model_relation"] == "adapter"
    assert str(tmp_path) not in text and str(tiny("sd3").parent) not in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == ["before.png", "after.png"]
    for name, iteration in zip(pictures, (0, 1)):
        grid = run / "samples" / f"{iteration:06d}.png"
        assert (tmp_path / "my-lora" / name).read_bytes() == grid.read_bytes()
    table = [line for line in text.splitlines() if line.startswith("| Reward, weighted sum")]
    first, last = [
        row["eval/reward_mean"]
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if row["iteration"] in (0, 1)
    ]
    assert len(table) == 1 and f"{first:.3f}" in table[0] and f"{last:.3f}" in table[0] and "±" in table[0]
    assert "\n- iterations: 1 of 2\n" in text
    assert re.search(r"^\| Colorfulness \| judge \|", text, re.MULTILINE)
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["loss"]["beta"] == 10.0 and settings["rollout"]["prompts"] == "prompts.txt"

    code = python_of(text).replace("org/base", str(tiny("sd3")))
    code = code.replace("YOUR-NAME/my-lora", str(tmp_path / "my-lora")).replace('pipe.to("cuda")\n', "")
    names = {}
    exec(code.replace("torch.bfloat16", "torch.float32"), names)
    assert names["image"].size == (RESOLUTION, RESOLUTION)


@pytest.mark.parametrize("family", ALL)
def test_the_code_on_a_card_draws_what_was_evaluated(inside, run_of, tiny, tmp_path, family):
    """Prompts are cut where the run cuts them, the size and the steps are the run's."""
    length = 125 if family == "qwen-image" else 24  # fewer tokens than the prompt has, behind a template
    settings = (f"evaluate.steps={STEPS}", f"model.text_length={length}", "train.iterations=1")
    run = run_of(family, *settings)
    pictures, _ = by_rollout(Source.of(str(run)).load(PROMPTS))
    exported(inside, run, "hub", tmp_path / "my-lora", "--base-model", "org/base")
    code = python_of((tmp_path / "my-lora" / "README.md").read_text(encoding="utf-8"))
    code = code.replace("org/base", str(tiny(family))).replace("YOUR-NAME/my-lora", str(tmp_path / "my-lora"))
    code = code.replace('pipe.to("cuda")\n', "").replace("torch.bfloat16", "torch.float32")
    names = {"prompt": PROMPTS[SAMPLE_PROMPTS[2]], "seed": SEEDS[2]}
    drawn = 'prompt, generator=torch.Generator().manual_seed(seed), output_type="pt"'
    exec(code.replace('"a photo of a red bicycle"', drawn), names)
    difference = (names["image"].permute(1, 2, 0) - pictures[2]).norm() / pictures[2].norm()
    assert difference < (0.03 if family == "sana" else 1e-4)  # its times are whole numbers


def test_the_licence_of_the_base(inside, run_of, tiny, tmp_path):
    base = tmp_path / "base"
    DiffusionPipeline.from_pretrained(tiny("flux")).save_pretrained(base)
    front = "license: other\nlicense_name: base-licence\nlicense_link: LICENSE.md\n"
    (base / "README.md").write_text(f"---\n{front}---\n# Base\n", encoding="utf-8")
    run = run_of("flux")
    exported(inside, run, "hub", tmp_path / "hub", "--model", base, "--base-model", "org/base")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "base-licence")
    assert card.data.license_link.endswith("/org/base/blob/main/LICENSE.md")
    assert "true_cfg_scale=1.0" in python_of(card.text)


def test_a_checkpoint_outside_its_run(inside, run_of, tmp_path):
    """Its card says what is not known, and its base need not be there any more."""
    run = run_of("sd3")
    moved = (run / "checkpoints" / "iteration-000001").rename(tmp_path / "moved")
    exported(inside, moved, "hub", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "No evaluation before and after is known" in text and "](" not in text.split("## Use it")[0]
    code, _, errors = inside("export", moved, "--to", "fused", "--out", tmp_path / "f", "--model", tmp_path)
    assert code == 2 and "model_index.json" in errors
    assert not (tmp_path / "f").exists()


def test_which_checkpoint(inside, run_of, tmp_path):
    """best is the one that is marked, and taken where none is named."""
    run = run_of("sd3")
    best = run / "checkpoints" / "best"
    best.unlink()
    best.symlink_to("iteration-000001")
    for options, iteration in (
        ((), 1),
        (("--checkpoint", "best"), 1),
        (("--checkpoint", "newest"), 2),
        (("--checkpoint", "1"), 1),
    ):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        said = exported(inside, run, "diffusers", out, *options)
        assert f"after iteration {iteration}" in said
        if not options:  # one rule for all that take a run
            assert Source.of(str(run)).folder == run / "checkpoints" / "iteration-000001"
        (file,) = out.glob("*.safetensors")
        source = run / "checkpoints" / f"iteration-{iteration:06d}" / "diffusers" / file.name
        assert file.read_bytes() == source.read_bytes()
    best.unlink()
    for name in ("best", "7"):
        code, _, errors = inside(
            "export", run, "--to", "diffusers", "--out", tmp_path / "x", "--checkpoint", name
        )
        assert code == 2 and f"has no {name}, expected one of newest, 1, 2" in errors
    assert "after iteration 2" in exported(inside, run, "diffusers", tmp_path / "y")


def test_nothing_is_written_over_and_nothing_is_left(inside, run_of, tmp_path):
    run = run_of("sd3")
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    code, _, errors = inside("export", run, "--to", "comfyui", "--out", there)
    assert code == 2 and "already exists" in errors and there.read_text() == "mine"
    file = checkpoint.find(run, "newest") / "diffusers" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = sorted(path.name for path in tmp_path.iterdir())
    source = ("export", run / "checkpoints" / "iteration-000002", "--to", "comfyui")
    code, _, errors = inside(*source, "--out", tmp_path / "new.safetensors")
    assert code == 2 and "missing or damaged" in errors and errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("to, name", [("comfyui", "lora"), ("diffusers", "lora.safetensors")])
def test_a_name_says_whether_a_file_or_a_folder_is_wanted(inside, tmp_path, to, name):
    code, _, errors = inside("export", tmp_path, "--to", to, "--out", tmp_path / name)
    assert code == 2 and f"{name}: " in errors and ".safetensors" in errors
    assert not (tmp_path / name).exists()


def test_what_comfyui_does_not_read(inside, run_of, tmp_path):
    code, _, errors = inside(
        *("export", run_of("sana"), "--to", "comfyui", "--out", tmp_path / "a.safetensors")
    )
    assert code == 2 and "ComfyUI does not read Sana" in errors


@pytest.mark.parametrize("family", ["flux2-klein", "qwen-image", "z-image"])
def test_default_layers_are_read_by_comfyui(inside, run_of, tmp_path, family):
    run = run_of(family, "evaluate.every=0", "train.iterations=1")
    exported(inside, run, "comfyui", tmp_path / "a.safetensors")
    expected = checkpoint.find(run, "newest") / "diffusers" / "pytorch_lora_weights.safetensors"
    found, expected = load_file(tmp_path / "a.safetensors"), load_file(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_alpha_beside_the_tensors_goes_into_them(inside, run_of, tmp_path):
    """As checkpoints of earlier versions have it."""
    run = run_of("flux", "evaluate.every=0", "train.iterations=1")
    folder = checkpoint.find(run, "newest")
    (file,) = (folder / "diffusers").glob("*.safetensors")
    state = load_file(file)
    said = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12})
    save_file(state, file, metadata={"format": "pt", "lora_adapter_metadata": said})
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(values | {"format": checkpoint.WITHOUT_MANIFEST}))
    exported(inside, folder, "comfyui", tmp_path / "a.safetensors")
    for key, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(value, state[key] * (3 if "lora_B" in key else 1))


def test_a_layer_that_comfyui_does_not_read(inside, run_of, tmp_path):
    run = run_of(
        "flux2-klein",
        "model.lora_targets=[time_guidance_embed.timestep_embedder.linear_1]",
        "evaluate.every=0",
    )
    code, _, errors = inside("export", run, "--to", "comfyui", "--out", tmp_path / "a.safetensors")
    assert code == 2 and "no adapter of time_guidance_embed.timestep_embedder.linear_1" in errors


def test_a_small_model_that_ships(inside, tmp_path):
    code, _, errors = inside("export", "builtin", "--to", "diffusers", "--out", tmp_path / "a")
    assert code == 2 and "nothing is trained in it" in errors
    trained = Trained(tmp_path, None, load_recipe("builtin"), {})
    for write in (write_comfyui, write_fused):
        with pytest.raises(UserError, match="is a small model of this package and no pipeline"):
            write(trained, tmp_path / "a")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("which", ["sampler", "old", "ema"])
def test_an_average_of_the_weights(inside, run_of, tiny, tmp_path, method, which):
    """Evaluated, saved and used elsewhere is one and the same; resuming goes on with the policy."""
    snapshots = ("snapshots.sampler=0/0.7/0/0.7", "snapshots.old=0/0.4/0/0.4", "snapshots.ema=0.9")
    once = (short("sd3"), "evaluate.every=2", "evaluate.guided_base=false", "checkpoint.every=2")
    run = run_of("sd3", f"model.method={method}", f"evaluate.weights={which}", *snapshots, *once)
    newest = run / "checkpoints" / "iteration-000002"
    tensors = load_file(newest / checkpoint.TENSORS)
    key = next(key for key in tensors if key.startswith("weights/policy/") and "to_q" in key)
    name = key.removeprefix("weights/policy/")
    assert (tensors[key] - tensors[f"weights/{which}/{name}"]).abs().max() > 1e-4

    source = Source.of(str(newest))
    pictures, _ = by_rollout(source.load(PROMPTS))
    pipe = load_pipeline(tiny("sd3"))
    if method == "lora":
        pipe.load_lora_weights(newest / "diffusers")
    else:
        kind = type(pipe.transformer)
        pipe.transformer = kind.from_pretrained(newest / "transformer")
        stored = load_file(newest / "transformer" / "diffusion_pytorch_model.safetensors")
        assert torch.equal(stored[name], tensors[f"weights/{which}/{name}"])
    torch.testing.assert_close(by_pipeline(pipe, "sd3", **as_short("sd3"))[0], pictures, rtol=1e-4, atol=1e-4)
    policy = Source.of(str(newest))
    policy = dataclasses.replace(
        policy, recipe=build_recipe(policy.recipe.model_dump(), ["evaluate.weights=policy"])
    )
    assert (by_rollout(policy.load(PROMPTS))[0] - pictures).abs().max() > 1e-3

    (again,) = evaluated([source])
    assert np.array_equal(again.scores.values["reward"], read_scores(scores_path(run, 2)).values["reward"])
    exported(inside, run, "hub", tmp_path / "hub", "--checkpoint", "newest")
    said = (tmp_path / "hub" / "README.md").read_text()
    assert f"evaluate.weights: {which}" in said and "average of the weights" in said

    resumed = Trainer(source.recipe, run, resume=True)
    assert torch.equal(resumed.weights.state()[f"policy/{name}"], tensors[key])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_any_set_of_a_checkpoint(inside, run_of, tiny, tmp_path, method):
    """What was not evaluated can be exported as well: each as it is used within this context."""
    settings = (short("sd3"), "snapshots.ema=0.9", "snapshots.sampler=0/0.7/0/0.7", "evaluate.every=0")
    run = run_of("sd3", f"model.method={method}", *settings)
    newest = run / "checkpoints" / "iteration-000002"
    pictures, length = {}, as_short("sd3")
    for name in ("policy", "ema", "sampler"):
        source = Source.of(str(newest))
        recipe = build_recipe(source.recipe.model_dump(), [f"evaluate.weights={name}"])
        pictures[name], _ = by_rollout(dataclasses.replace(source, recipe=recipe).load(PROMPTS))
        exported(inside, newest, "diffusers", tmp_path / name, "--weights", name)
        pipe = load_pipeline(tiny("sd3"))
        if method == "lora":
            pipe.load_lora_weights(tmp_path / name)
        else:
            pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / name)
        drawn, _ = by_pipeline(pipe, "sd3", **length)
        torch.testing.assert_close(drawn, pictures[name], rtol=1e-4, atol=1e-4)
    assert (pictures["ema"] - pictures["policy"]).abs().max() > 1e-3
    assert (pictures["ema"] - pictures["sampler"]).abs().max() > 1e-3
    exported(inside, newest, "fused", tmp_path / "fused", "--weights", "ema")
    fused, _ = by_pipeline(load_pipeline(tmp_path / "fused"), "sd3", **length)
    torch.testing.assert_close(fused, pictures["ema"], rtol=1e-4, atol=1e-4)
    code, _, errors = inside("export", run, "--to", "hub", "--out", tmp_path / "hub", "--weights", "ema")
    assert code == 2 and "expected policy for the hub" in errors


def test_another_set_is_written_beside_what_is_exported(inside, run_of, tmp_path, monkeypatch):
    """The system's folder for temporary files may have no room for a whole network."""
    run = run_of("sd3", "evaluate.every=0", "train.iterations=1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    exported(inside, run, "diffusers", tmp_path / "lora", "--weights", "old")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_a_set_that_is_not_there(inside, run_of, tmp_path):
    run = run_of("sd3", "evaluate.every=0")
    code, _, errors = inside("export", run, "--to", "diffusers", "--out", tmp_path / "a", "--weights", "ema")
    assert code == 2 and "expected one of policy, old, sampler" in errors and not (tmp_path / "a").exists()
