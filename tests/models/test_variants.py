"""Pipelines that come otherwise than whole and in float32: half-precision files, without T5, gated."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from crd_fast.errors import UserError
from crd_fast.models import checks, find_pipeline, load_model
from tests.models.conftest import PROMPTS, RESOLUTION, STEPS, by_pipeline, by_rollout, load_pipeline


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of a tiny pipeline that a test may change."""
    return shutil.copytree(tiny("sd3"), tmp_path / "copy")


def test_files_of_a_variant_are_loaded(tiny, recipe, copy, tmp_path, monkeypatch):
    for file in [*copy.glob("*/*.safetensors")]:
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    plain = load_model(recipe(tiny("sd3"), f"model.prompt_cache={tmp_path / 'plain'}"), PROMPTS)
    model = load_model(recipe(copy, f"model.prompt_cache={tmp_path / 'variant'}"), PROMPTS)
    expected = plain.transformer.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.transformer.state_dict().items())
    torch.testing.assert_close(by_rollout(model), by_rollout(plain), rtol=0, atol=0)


def test_shards_of_a_variant_are_loaded(tiny, recipe, copy):
    """As diffusers and transformers write them, with the variant in the names of shards and index."""
    plain = load_model(recipe(tiny("sd3")), PROMPTS).transformer.half()
    for folder, network in (
        (copy / "transformer", plain),
        (copy / "text_encoder_3", T5EncoderModel.from_pretrained(copy / "text_encoder_3").half()),
    ):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        size = sum(parameter.nbytes for parameter in network.parameters()) // 3
        network.save_pretrained(folder, variant="fp16", max_shard_size=size)
        assert len(list(folder.glob("*.fp16-00*.safetensors"))) > 1
        assert checks.variant(folder) == "fp16" and checks.stored_dtype(folder) == torch.float16
    expected, found = plain.float().state_dict(), load_model(recipe(copy), PROMPTS).transformer.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    next(copy.glob("transformer/*.fp16-00002*")).unlink()
    with pytest.raises(UserError, match=r"transformer/.*fp16-00002.* is missing"):
        load_model(recipe(copy))


def test_weights_that_a_config_does_not_ask_for_are_said(recipe, copy, caplog):
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"qk_norm": None}))
    load_model(recipe(copy), PROMPTS)
    (said,) = (text for text in caplog.messages if "does not ask for" in text)
    assert str(copy / "transformer") in said and "norm_added_k.weight and " in said


def test_stable_diffusion_3_without_t5_is_the_pipeline_without(recipe, copy):
    """As diffusers draws when it is told to leave the third encoder out."""
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(copy / name)
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (copy / "model_index.json").write_text(json.dumps(index))
    pipe = DiffusionPipeline.from_pretrained(copy, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    _, expected = by_pipeline(pipe, "sd3")
    _, latents = by_rollout(load_model(recipe(copy)))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "flux2-klein"])
@pytest.mark.parametrize("change", [{"use_flow_sigmas": True}, {"use_karras_sigmas": True}])
def test_noise_levels_are_those_of_the_pipeline_with_its_scheduler(tiny, recipe, tmp_path, family, change):
    """Also where the config has a key that another solver left in it, by which these pipelines go."""
    copy = shutil.copytree(tiny(family), tmp_path / "copy")
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    pipe = load_pipeline(copy)
    by_pipeline(pipe, family)
    _, model = find_pipeline(str(copy))
    found = model(copy, recipe(copy)).sigmas(STEPS, RESOLUTION)
    torch.testing.assert_close(found, pipe.scheduler.sigmas)


class Hub(http.server.BaseHTTPRequestHandler):
    """Says of org/gated what the hub says of a gated model, and knows no other."""

    def do_HEAD(self):
        gated = "org/gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


ASK = """
import sys
from crd_fast.cli import main
arguments, names = sys.argv[1:-2], sys.argv[-2:]
for name in names:
    sys.argv = ["crd-fast", *arguments, "--set", f"model.path={name}"]
    try:
        main()
    except SystemExit as ended:
        print("exit code", ended.code, file=sys.stderr, flush=True)
"""
NAMES = "org/gated", "org/none"


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What is printed for each name, and where the hub is: of one process, as it imports for ten seconds."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    endpoint, folder = f"http://127.0.0.1:{hub.server_port}", tmp_path_factory.mktemp("hub")
    (folder / "prompts.txt").write_text("a\n")
    settings = ["rewards={colorfulness: 1}", "rollout.prompts=prompts.txt", "evaluate.every=0"]
    command = [sys.executable, "-c", ASK, "train", "--output", "run"]
    done = subprocess.run(
        [*command, *(item for setting in settings for item in ("--set", setting)), *NAMES],
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    hub.shutdown()
    parts = done.stderr.split("exit code 2\n")
    assert len(parts) == len(NAMES) + 1 and not parts.pop(), done.stderr
    return dict(zip(NAMES, parts)), endpoint


@pytest.mark.parametrize(
    "name, words",
    [
        ("org/gated", "asks for its licence to be accepted: do so at {}/org/gated, then `hf auth login`"),
        ("org/none", "not to be seen at {}/org/none: if it is private, `hf auth login`"),
    ],
)
def test_a_model_that_the_hub_does_not_give(refused, name, words):
    said, endpoint = refused
    assert said[name].count("\n") == 1 and words.format(endpoint) in said[name], said


def test_weights_of_another_config_are_refused_by_name(recipe, copy):
    config = copy / "transformer" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(values | {"caption_projection_dim": 2 * values["caption_projection_dim"]}))
    with pytest.raises(UserError, match=r"^model.path: .*copy/transformer: cannot be loaded: ") as error:
        load_model(recipe(copy), ["a"])
    assert "\n" not in str(error.value)


def without_one(tensors):
    """Less a tensor, as in weights of fewer layers."""
    return {name: tensors[name] for name in sorted(tensors)[:-1]}


def narrower(tensors):
    """One of another shape, as in weights of another width."""
    name = max(tensors, key=lambda name: tensors[name].numel())
    return tensors | {name: tensors[name][..., :-1].contiguous()}


ENCODERS = [
    *(("sd3", name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")),
    *(("flux", name) for name in ("text_encoder", "text_encoder_2")),
    *((family, "text_encoder") for family in ("flux2-klein", "qwen-image", "z-image", "sana")),
]
NETWORKS = [("sd3", "transformer"), ("sd3", "vae")]


@pytest.mark.parametrize("change", [without_one, narrower])
@pytest.mark.parametrize(("family", "component"), ENCODERS + NETWORKS)
def test_weights_that_are_not_the_config_s_are_refused_by_name(
    tiny, recipe, tmp_path, family, component, change
):
    """The libraries would begin with random numbers in place of those that they miss."""
    folder = shutil.copytree(tiny(family), tmp_path / "copy")
    (file,) = (folder / component).glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_model(recipe(folder), ["a"])
    assert str(error.value).startswith(f"model.path: {folder / component}: cannot be loaded: ")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
