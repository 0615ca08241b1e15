"""Damaged, missing and interrupted checkpoints: named, passed over, never taken for whole ones."""

import json
import os
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from crd_fast.errors import UserError
from crd_fast.weights import checkpoint, durable


class Policy:
    """Weights of a few numbers."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.values = {"policy/w": torch.randn(5, 3, generator=generator), "old/w": torch.zeros(5, 3)}

    def state(self):
        return self.values

    def save_policy(self, folder, name="policy"):
        (folder / "peft").mkdir()
        (folder / "peft" / "adapter_config.json").write_text('{"r": 4}')


def save(folder, iteration, keep=3, best=None, weights=None):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.ones(3)
    optimizer.step()
    path = folder / f"iteration-{iteration:06d}"
    state = {"iteration": iteration}
    checkpoint.save(path, weights or Policy(iteration), optimizer, state, keep, best)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


FILES = ("state.json", "training.safetensors", "manifest.json", "peft/adapter_config.json")


def truncated(path, rng):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: rng.randrange(size)])


def flipped(path, rng):
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zeroed(path, rng):
    """As a file system may leave it after a power cut: its size, and no content."""
    path.write_bytes(bytes(path.stat().st_size))


def longer(path, rng):
    path.write_bytes(path.read_bytes() + b"\0")


def missing(path, rng):
    path.unlink()


def emptied(path, rng):
    path.write_bytes(b"")


def a_folder_in_its_place(path, rng):
    path.unlink()
    path.mkdir()


KINDS = (truncated, flipped, zeroed, longer, missing, emptied, a_folder_in_its_place)
ROUNDS = {truncated: 6, flipped: 12}  # of the others one each: 92 cases


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, name, kind):
    rng = random.Random(f"{name} {kind.__name__}")
    save(tmp_path, 1)
    save(tmp_path, 2)
    whole = shutil.copytree(tmp_path / "iteration-000002", tmp_path / "copy")
    for _ in range(ROUNDS.get(kind, 1)):
        shutil.rmtree(tmp_path / "iteration-000002")
        shutil.copytree(whole, tmp_path / "iteration-000002")
        kind(tmp_path / "iteration-000002" / name, rng)
        caplog.clear()
        assert checkpoint.newest(tmp_path) == tmp_path / "iteration-000001"
        assert "iteration-000002" in caplog.text and "Traceback" not in caplog.text
        with pytest.raises(UserError, match="iteration-000002"):
            checkpoint.find(tmp_path / "iteration-000002")


def test_damaged_ones_are_put_aside_and_all_damaged_is_an_error(tmp_path, caplog):
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    for iteration in (2, 3):
        emptied(tmp_path / f"iteration-{iteration:06d}" / "training.safetensors", None)
    assert checkpoint.newest(tmp_path, put_aside=True).name == "iteration-000001"
    assert names(tmp_path) == ["damaged-iteration-000002", "damaged-iteration-000003", "iteration-000001"]
    missing(tmp_path / "iteration-000001" / "state.json", None)
    with pytest.raises(UserError, match=r"iteration-000001: .*state\.json is missing"):
        checkpoint.newest(tmp_path, put_aside=True)


def test_a_checkpoint_of_the_format_before_is_taken(tmp_path):
    path = save(tmp_path, 1)
    (path / durable.MANIFEST).unlink()
    with pytest.raises(UserError, match="manifest"):
        checkpoint.newest(tmp_path)
    state = json.loads((path / "state.json").read_text()) | {"format": 1}
    (path / "state.json").write_text(json.dumps(state))
    assert checkpoint.newest(tmp_path) == path


def test_only_what_was_written_is_removed(tmp_path):
    save(tmp_path, 1, keep=1)
    shutil.copytree(tmp_path / "iteration-000001", tmp_path / "iteration-000001-best")
    (tmp_path / "iteration-000001" / "notes.txt").write_text("mine")
    (tmp_path / "iteration-000001" / "peft" / "merged.txt").write_text("mine")
    (tmp_path / "iteration-0").mkdir()
    (tmp_path / "iteration-000000").write_text("a file")
    save(tmp_path, 2, keep=1)
    found = {str(path.relative_to(tmp_path)) for path in (tmp_path / "iteration-000001").rglob("*")}
    assert found == {
        "iteration-000001/notes.txt",
        "iteration-000001/peft",
        "iteration-000001/peft/merged.txt",
    }
    assert durable.damage(tmp_path / "iteration-000001-best") is None
    assert {"iteration-0", "iteration-000000", "iteration-000002"} < set(names(tmp_path))


def test_the_best_stays_beside_the_newest(tmp_path):
    for iteration in range(1, 6):
        path = save(tmp_path, iteration, keep=2, best=2 if iteration > 2 else None)
        if iteration == 2:
            checkpoint.mark_best(path)
    assert names(tmp_path) == ["best", "iteration-000002", "iteration-000004", "iteration-000005"]
    assert checkpoint.find(tmp_path / "best") == tmp_path / "best"
    assert checkpoint.read_state(tmp_path / "best")["iteration"] == 2
    checkpoint.mark_best(tmp_path / "iteration-000005")
    assert checkpoint.read_state(tmp_path / "best")["iteration"] == 5


def test_of_a_run_the_best_is_taken(tmp_path, caplog):
    """And said where there is a newer one; every other can be named."""
    folder = tmp_path / "checkpoints"
    first, last = save(folder, 1), save(folder, 2)
    assert checkpoint.find(tmp_path) == last
    checkpoint.mark_best(last)
    assert checkpoint.find(tmp_path) == last and not caplog.messages
    checkpoint.mark_best(first)
    assert checkpoint.find(tmp_path) == first
    (said,) = caplog.messages
    assert f"taking {first}, the best by the held-out score; the newest: {last}" in said
    for which, found in (("newest", last), ("best", first), ("2", last), ("1", first)):
        assert checkpoint.find(tmp_path, which) == found
    assert checkpoint.find(last) == last and caplog.messages == [said]
    with pytest.raises(UserError, match="has no 7, expected one of newest, best, 1, 2"):
        checkpoint.find(tmp_path, "7")
    with pytest.raises(UserError, match="is a checkpoint already"):
        checkpoint.find(last, "newest")
    truncated(first / "training.safetensors", random.Random(0))
    with pytest.raises(UserError, match=r"iteration-000001: .*training\.safetensors"):
        checkpoint.find(tmp_path)
    shutil.rmtree(first)  # the link leads nowhere
    assert checkpoint.find(tmp_path) == last


def test_a_folder_called_best_is_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "best").mkdir(parents=True)
    checkpoint.mark_best(save(folder, 1))
    assert (folder / "best").is_dir() and not (folder / "best").is_symlink()
    assert checkpoint.find(tmp_path) == folder / "iteration-000001"


def test_a_copy_of_a_run_finds_its_best_again(tmp_path, caplog):
    """Copied with `cp -rL`, by a cloud's tools or in an archive, it has a folder where the link was."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(save(folder, 1), folder / "best")
    checkpoint.mark_best(save(folder, 2))
    assert checkpoint.read_state(folder / "best")["iteration"] == 2
    assert checkpoint.read_state(folder / "copied-best")["iteration"] == 1
    assert caplog.messages == [
        f"warning: {folder / 'best'}: a copy where a link was: it is now called copied-best"
    ]
    assert checkpoint.find(tmp_path) == folder / "iteration-000002"


def test_what_has_the_name_already_is_put_aside(tmp_path, caplog):
    (tmp_path / "iteration-000001").mkdir()
    (tmp_path / "iteration-000001" / "mine.txt").write_text("mine")
    save(tmp_path, 1)
    assert (tmp_path / "other-iteration-000001" / "mine.txt").read_text() == "mine"
    assert "iteration-000001: was there already: it is now called other-iteration-000001" in caplog.text
    assert durable.damage(tmp_path / "iteration-000001") is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["policy/w", "old/w"])
def test_numbers_that_are_not_finite_replace_nothing(tmp_path, where, bad):
    save(tmp_path, 1, keep=1)
    weights = Policy(2)
    weights.values[where][4, 1] = bad
    with pytest.raises(UserError, match=f"weights/{where}: expected finite numbers"):
        save(tmp_path, 2, keep=1, weights=weights)
    assert names(tmp_path) == ["iteration-000001"]


def test_an_optimizer_that_is_not_finite_replaces_nothing(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[parameter]["exp_avg_sq"][1] = float("inf")
    with pytest.raises(UserError, match="exp_avg_sq: expected finite numbers"):
        checkpoint.save(tmp_path / "iteration-000001", Policy(1), optimizer, {}, keep=1)
    assert names(tmp_path) == []


WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}  # events of sys.addaudithook


@pytest.mark.slow
def test_killed_at_each_write_there_is_a_whole_checkpoint(tmp_path):
    """In a forked child each: the imports are done, and a kill is a kill."""
    killed = 0
    for count in range(200):
        folder = tmp_path / str(count)
        folder.mkdir()
        save(folder, 1, keep=1)
        save(folder, 2, keep=1)
        child = os.fork()
        if child == 0:
            left = [count]

            def kill(event, args, left=left, folder=folder):
                if event in WRITES and str(folder) in " ".join(map(str, args)):
                    if left[0] == 0:
                        os.kill(os.getpid(), 9)
                    left[0] -= 1

            sys.addaudithook(kill)
            save(folder, 3, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = checkpoint.newest(folder)
        assert found.name in ("iteration-000002", "iteration-000003"), count
        tensors = load_file(found / "training.safetensors")
        expected = Policy(checkpoint.iteration_of(found)).values["policy/w"]
        assert torch.equal(tensors["weights/policy/w"], expected)
        save(folder, 4, keep=1)
        assert names(folder) == ["iteration-000004"], count
        if os.WIFEXITED(status):
            break
        killed += 1
    assert killed > 20 and os.WIFEXITED(status)


class Buffers:
    """Marks the moments that are made as bitsandbytes marks those in paged memory, which only a GPU has."""

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged = True
        return buffer

    def prefetch_state(self, p):
        pass


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_paged_optimizer_is_paged_after_a_resume(tmp_path, kind):
    from crd_fast.weights import bf16, paged

    base = bf16.RoundedPagedAdamW8bit if kind == "bfloat16" else paged.PagedAdamW8bit
    optimizers = []
    for _ in range(2):
        parameter = torch.nn.Parameter(torch.ones(64, 128, dtype=getattr(torch, kind)))
        optimizer = type("Optimizer", (Buffers, base), {})([parameter], lr=1e-2)
        optimizer.seed = 1
        if kind == "bfloat16":
            bf16.widen_gradients([parameter])
        optimizers.append((parameter, optimizer))

    def step(parameter, optimizer, seed):
        gradient = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
        parameter.grad = gradient
        optimizer.step()

    (parameter, optimizer), (again, resumed) = optimizers
    step(parameter, optimizer, 1)
    path = tmp_path / "iteration-000001"
    checkpoint.save(path, Policy(1), optimizer, {}, keep=1)
    again.data.copy_(parameter.data)

    class Loaded(Policy):
        def load_state(self, state):
            pass

    checkpoint.load(path, Loaded(1), resumed)
    for name in ("state1", "state2"):
        assert resumed.state[again][name].is_paged and resumed.state[again][name].dtype == torch.uint8
    step(parameter, optimizer, 2)
    step(again, resumed, 2)
    assert torch.equal(parameter, again)
