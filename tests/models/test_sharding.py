"""Every family's network in two processes: the gradient of one process, and what leaves as a policy."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crd_fast.models import compile_blocks, load_model
from crd_fast.ranks import Ranks, end_group
from crd_fast.schema import LossConfig
from crd_fast.train.update import Updater
from crd_fast.weights.make import make_weights
from tests.forked import two_ranks
from tests.models.conftest import ALL, GROUP, GUIDANCE, PROMPTS, pairs_of_two_prompts


def accumulate(settings, pairs):
    """Weights with the gradient of these pairs, the policy moved away from its snapshots."""
    model = load_model(settings, PROMPTS)
    weights = make_weights(model, settings)
    if settings.train.compile:  # traced and run by torch's own kernels
        compile_blocks(model.transformer, backend="aot_eager")
    with torch.no_grad():
        for parameter in weights.trained():
            parameter.mul_(1.01)
    latents = torch.randn(2 * GROUP, *model.latent_shape(64), generator=torch.Generator().manual_seed(1))
    updater = Updater(
        model,
        weights,
        LossConfig(beta=5.0, guidance_scale=GUIDANCE),
        advantage_clip=5.0,
        precision="fp32",
        micro_batch=3,
    )
    updater.accumulate(
        pairs, latents.to(model.device), model.encode_prompts(PROMPTS), model.encode_prompts([""])
    )
    return weights


def gradients(weights):
    names = [key.removeprefix("policy/") for key in weights.state() if key.startswith("policy/")]
    pairs = zip(names, weights.trained(), strict=True)
    return {name: parameter.grad for name, parameter in pairs if parameter.grad is not None}


def in_two_processes(folder, function, *arguments):
    """Runs function(rank, *arguments) in each, of one process group."""
    for done in two_ranks(folder / "ranks", rank_main, function, arguments):
        assert done.returncode == 0, done.stderr


def rank_main(function, arguments):
    function(int(os.environ["RANK"]), *arguments)
    # a thread of the group that still runs when the interpreter goes aborts the process, now and then
    assert gloo_threads()
    end_group()
    assert not gloo_threads()


def gloo_threads():
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def sharded(rank, recipes, folder):
    ranks, pairs = Ranks(), pairs_of_two_prompts()
    for family, settings in recipes.items():
        weights = accumulate(settings, pairs[pairs.prompt == rank])
        weights.take_gradients()
        collected = ranks.collect(gradients(weights))
        whole, _ = weights.gathered(torch.optim.SGD(weights.trained()), ranks)
        if ranks.main:
            whole.save_policy(folder / family)
            found = {key: torch.cat([g[key] for g in collected if key in g]) for key in collected[0]}
            torch.save(found, folder / f"{family}.pt")


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one(tiny, recipe, tmp_path):
    full = ("model.method=full", "train.checkpointing=true")
    recipes = {family: recipe(tiny(family), *full) for family in ALL}
    expected = {}
    for family, settings in recipes.items():
        weights = accumulate(settings, pairs_of_two_prompts())
        expected[family] = gradients(weights)
        weights.save_policy(tmp_path / "one" / family)  # also fills the cache of encoded prompts
    full += ("model.sharding=fsdp",)
    recipes = {family: recipe(tiny(family), *full, f"train.compile={family == 'sd3'}") for family in ALL}
    in_two_processes(tmp_path, sharded, recipes, tmp_path)
    for family in ALL:
        found = torch.load(tmp_path / f"{family}.pt")
        assert found.keys() == expected[family].keys(), family
        scale = max(gradient.abs().max() for gradient in found.values())
        for name, gradient in expected[family].items():
            assert found[name].shape == gradient.shape
            assert (found[name] - gradient).abs().max() < 1e-4 * scale, (family, name)
        one, two = tmp_path / "one" / family / "transformer", tmp_path / family / "transformer"
        assert (two / "config.json").read_text() == (one / "config.json").read_text()
        policies = [load_file(f / "diffusion_pytorch_model.safetensors") for f in (one, two)]
        assert policies[0].keys() == policies[1].keys()
        assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])


def compared(rank, settings, folder):
    Ranks()  # the process group
    weights = make_weights(load_model(settings, PROMPTS), settings)
    found = [weights.is_policy("old")]
    for other in range(2):
        before = weights.trained()[-1].detach().clone()
        if rank == other:
            weights.trained()[-1].data += 1
        found.append(weights.is_policy("old"))
        weights.trained()[-1].data.copy_(before)
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_all_ranks_take_old_for_the_policy_or_none_does(tiny, recipe, tmp_path):
    """Even where a rank's own part is equal: for the forward that it left out the others would wait."""
    full = ("model.method=full", "train.checkpointing=true")
    load_model(recipe(tiny("sd3"), *full), PROMPTS)  # fills the cache of encoded prompts
    in_two_processes(tmp_path, compared, recipe(tiny("sd3"), *full, "model.sharding=fsdp"), tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [
        [True, False, False]
    ] * 2


def averaged(rank, settings, folder):
    ranks, pairs = Ranks(), pairs_of_two_prompts()
    weights = accumulate(settings, pairs[pairs.prompt == rank])
    ranks.average_gradients(weights.trained())
    if ranks.main:
        torch.save(gradients(weights), folder / "averaged.pt")


@pytest.mark.slow
def test_averages_where_some_adapters_have_no_gradient(tiny, recipe, tmp_path):
    """The text stream of Qwen-Image's last block leads nowhere."""
    settings = recipe(tiny("qwen-image"))
    weights = accumulate(settings, pairs_of_two_prompts())
    expected = gradients(weights)
    assert 0 < len(expected) < len(weights.trained())
    in_two_processes(tmp_path, averaged, settings, tmp_path)
    found = torch.load(tmp_path / "averaged.pt")
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert all((found[name] - expected[name]).abs().max() < 1e-4 * scale for name in expected)
