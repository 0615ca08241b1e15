"""Everything that is written can be read by whom the umask lets, whichever library wrote it."""

import os
import stat
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from crd_fast.models.prompt_cache import PromptCache
from crd_fast.run.new_files import made_beside
from crd_fast.train.export import copy_weights
from crd_fast.weights import checkpoint


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def mode(request):
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    files = [path for path in folder.rglob("*.*") if path.is_file()]
    assert files
    return {stat.S_IMODE(path.stat().st_mode) for path in files}


def test_what_is_exported(tmp_path, mode):
    with made_beside(tmp_path / "lora", "--out") as partial:
        partial.mkdir()
        save_file({"a": torch.ones(2)}, partial / "lora.safetensors")
        (partial / "README.md").write_text("a LoRA")
    with made_beside(tmp_path / "one.safetensors", "--out") as partial:
        save_file({"a": torch.ones(2)}, partial)
    assert modes(tmp_path) == {mode}


def test_what_is_exported_of_a_run_that_is_read_only(tmp_path, mode):
    weights = tmp_path / "run" / "diffusers"
    weights.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, weights / "lora.safetensors")
    for path in (weights / "lora.safetensors", weights, weights.parent):
        path.chmod(path.stat().st_mode & ~0o222)
    copy_weights(SimpleNamespace(weights=weights), tmp_path / "lora")
    assert modes(tmp_path / "lora") == {mode}
    folder = stat.S_IMODE((tmp_path / "lora").stat().st_mode)
    assert folder == mode | (mode & 0o444) >> 2  # who may read may enter, and its owner writes there
    for path in (weights.parent, weights):
        path.chmod(0o755)


def test_prompts_that_are_kept(tmp_path, mode):
    (tmp_path / "cache").mkdir()
    PromptCache(tmp_path / "cache", 1.0).put("a cat", {"states": torch.ones(3, 2)})
    assert modes(tmp_path / "cache") == {mode}


def test_a_checkpoint(tmp_path, mode):
    class Policy:
        def state(self):
            return {"policy/w": torch.ones(2)}

        def save_policy(self, folder, name="policy"):
            save_file(self.state(), folder / "lora.safetensors")

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    checkpoint.save(tmp_path / "iteration-000001", Policy(), optimizer, {"iteration": 1}, 3)
    assert modes(tmp_path) == {mode}
