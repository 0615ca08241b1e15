"""Attention backends and torch.compile: switches that change how fast, not what."""

import pytest
import torch
from torch._dynamo.utils import counters

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.models import compile_blocks, load_model
from crd_fast.run.metrics import read_metrics
from crd_fast.train.trainer import Trainer
from crd_fast.train.update import Updater
from crd_fast.weights.make import make_weights
from tests.models.conftest import GROUP, PROMPTS, RESOLUTION, by_rollout, pairs_of_two_prompts, short


def test_the_native_backend_draws_the_same(tiny, recipe):
    latents = []
    for backend in ("default", "native"):
        model = load_model(recipe(tiny("flux"), f"model.attention={backend}"))
        latents.append(by_rollout(model)[1])
    torch.testing.assert_close(*latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "backend", "message"),
    [
        ("flux", "nativ", r"model.attention: nativ: .*must be one of"),
        ("flux", "flash", r"model.attention: flash: .*flash"),
        ("sd3", "native", r"model.attention: expected default for SD3Transformer2DModel"),
    ],
)
def test_a_backend_that_cannot_be_used_is_refused(tiny, recipe, family, backend, message):
    if backend == "flash" and torch.cuda.is_available():
        pytest.skip("flash-attn may be installed beside a GPU")
    with pytest.raises(UserError, match=message):
        load_model(recipe(tiny(family), f"model.attention={backend}"))


@pytest.mark.parametrize("family", ["qwen-image", "z-image"])
def test_other_prompts_and_rows_compile_nothing(tiny, recipe, family):
    """Once lengths and numbers of rows have changed, no other of them is compiled or runs as written."""
    prompts = [letter * length for letter, length in zip("abcdefg", (2, 40, 75, 110, 150, 190, 230))]
    model = load_model(recipe(tiny(family)), prompts)
    embeddings = model.encode_prompts(prompts)
    assert len(set(embeddings["length"].tolist())) > 5
    torch._dynamo.reset()
    compile_blocks(model.transformer, backend="eager")

    @torch.no_grad()
    def run(*chosen):
        x = torch.randn(len(chosen), *model.latent_shape(RESOLUTION))
        rows = {key: value[list(chosen)] for key, value in embeddings.items()}
        model.velocity(x, torch.full((len(chosen),), 0.5), rows)

    # of different lengths, which need a mask, of one length, and alone
    for chosen in [(0, 1), (2, 3, 1), (1, 1), (2, 2, 2), (0,), (1,)]:
        run(*chosen)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for chosen in [(4, 1, 2, 0), (6, 5), (5, 5, 5, 5), (3, 3), (3,), (6,)]:
            run(*chosen)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_more_blocks_of_one_kind_compile_nothing(recipe, method):
    """Blocks share what is compiled: each with its own, large networks would run as written past a limit."""
    settings = recipe("builtin", f"model.method={method}")
    model = load_model(settings)
    blocks = model.transformer.transformer_blocks
    del blocks[-1]  # of another kind
    weights = make_weights(model, settings)
    embeddings = model.encode_prompts(["a red circle", "two blue squares"])
    x, t = torch.randn(2, *model.latent_shape(32)), torch.full((2,), 0.5)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model.transformer, backend="eager")

    def graphs(used):
        """As many as there are when so many blocks have run by the sampler's weights and the policy's."""
        model.transformer.transformer_blocks = blocks[:used]
        with torch.no_grad(), weights.use("sampler"):
            model.velocity(x, t, embeddings)
        with weights.use("policy"):
            model.velocity(x, t, embeddings)
        return counters["stats"]["unique_graphs"]

    few = graphs(2)  # with adapters, what comes into the first has no gradient
    assert few > 0 and graphs(4) == few


def test_a_partial_anchor_compiles_no_more_than_a_whole_one(tiny, recipe):
    """How many rows of a micro-batch are anchored changes from one to the next."""
    settings = recipe(tiny("sd3"), short("sd3"))

    def graphs(*anchors):
        """How many there are after each micro-batch."""
        torch._dynamo.reset()
        counters.clear()
        model = load_model(settings, PROMPTS)
        del model.transformer.transformer_blocks[::2]  # leaves one of three kinds, each compiled alike
        weights = make_weights(model, settings)
        with torch.no_grad():
            weights.trained()[1].add_(0.1)  # or old, being equal, would not be run
        compile_blocks(model.transformer, backend="eager")
        latents = torch.randn(2 * GROUP, *model.latent_shape(RESOLUTION))
        updater = Updater(
            model, weights, settings.loss, advantage_clip=5.0, precision="fp32", micro_batch=GROUP
        )
        found = []
        for anchored in anchors:
            anchor = torch.tensor(anchored).float()
            empty = model.encode_prompts([""])
            updater.accumulate(pairs_of_two_prompts(anchor), latents, model.encode_prompts(PROMPTS), empty)
            found.append(counters["stats"]["unique_graphs"])
        return found

    two_and_three, four_and_two = [1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 1, 1, 0]
    (whole,), (few, no_more) = graphs([1] * 8), graphs(two_and_three, four_and_two)
    assert whole <= few == no_more


def test_compiled_blocks_train_as_eager_ones(tmp_path, monkeypatch):
    """Traced and run by torch's own kernels: generating code for every set of weights takes minutes.

    Two blocks of five, which share what is traced: the last, which is of another kind, would double it.
    """
    compiled = []

    def two_blocks(*arguments, **options):
        model = load_model(*arguments, **options)
        del model.transformer.transformer_blocks[2:]
        return model

    def traced(network):
        compiled.append(network)
        compile_blocks(network, backend="aot_eager")

    monkeypatch.setattr("crd_fast.train.trainer.compile_blocks", traced)
    monkeypatch.setattr("crd_fast.train.trainer.load_model", two_blocks)
    settings = ["rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4", "rollout.steps=2"]
    settings += ["train.timesteps=1", "train.iterations=2", "evaluate.every=0"]
    records = {}
    for switch in (False, True):
        run = tmp_path / str(switch)
        Trainer(load_recipe("builtin", [*settings, f"train.compile={switch}"]), run).run()
        records[switch] = read_metrics(run)
    assert len(compiled) == 1
    for eager, other in zip(records[False], records[True], strict=True):
        for name in ("reward_mean", "kl", "kl_loss", "policy_loss", "grad_norm"):
            assert other[name] == pytest.approx(eager[name], rel=5e-3), name
