"""Snapshots, and the files in which trained weights leave."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import PeftModel
from safetensors.torch import load_file

from crd_fast.errors import UserError
from crd_fast.models import builtin
from crd_fast.ranks import Ranks
from crd_fast.weights import checkpoint
from crd_fast.weights.base import Weights
from crd_fast.weights.full import FullWeights, HostWeights
from crd_fast.weights.lora import LoraWeights

TARGETS = list(builtin.BuiltinModel.lora_targets)


def network(layers=2):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=2,
        qk_norm="rms_norm",
    )
    for parameter in model.parameters():  # the class starts some of them at 0
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def forward(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, 3, 8, 8, generator=generator),
            encoder_hidden_states=torch.randn(2, 5, 16, generator=generator),
            pooled_projections=torch.randn(2, 16, generator=generator),
            timestep=torch.tensor([300.0, 900.0]),
            return_dict=False,
        )[0]


def lora(model=None):
    return LoraWeights(model or network(), rank=4, alpha=8, targets=TARGETS, seed=3)


MAKE = {
    "lora": lora,
    "full": lambda: FullWeights(network()),
    "host": lambda: HostWeights(network()),
}


def train_a_little(weights):
    torch.manual_seed(5)
    for parameter in weights.trained():
        parameter.data.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", MAKE)
def test_sets_of_weights(kind):
    weights = MAKE[kind]()
    base = forward(weights.network)
    # to rounding: torch may take other algorithms for weights that are frozen
    torch.testing.assert_close(base, forward(network()))
    for name in ("old", "sampler", "reference"):
        with weights.use(name):
            assert torch.equal(forward(weights.network), base)
    train_a_little(weights)
    trained = forward(weights.network)
    assert not torch.allclose(trained, base)
    for name in ("old", "sampler", "reference"):
        with weights.use(name):
            assert torch.equal(forward(weights.network), base)
    weights.blend("old", 0.0)
    with weights.use("old"):
        assert torch.equal(forward(weights.network), trained)
    with weights.use("sampler"):
        assert torch.equal(forward(weights.network), base)
    assert torch.equal(forward(weights.network), trained)


@pytest.mark.parametrize("kind", MAKE)
def test_a_snapshot_is_the_policy_only_where_all_of_it_is(kind):
    weights = MAKE[kind]()
    train_a_little(weights)
    assert not weights.is_policy("old")
    weights.blend("old", 0.0)
    assert weights.is_policy("old") and not weights.is_policy("sampler")
    for parameter in weights.trained():
        number = parameter.data.view(-1)[-1]
        before = number.clone()
        number.copy_(torch.nextafter(number, number + 1))
        assert not weights.is_policy("old")
        number.copy_(before)
    assert weights.is_policy("old")


@pytest.mark.parametrize("kind", MAKE)
def test_blend_is_the_moving_average(kind):
    weights = MAKE[kind]()
    before = {name: value.clone() for name, value in weights.state().items()}
    train_a_little(weights)
    weights.blend("sampler", 0.75)
    after = weights.state()
    for name, value in before.items():
        if name.startswith("sampler/"):
            policy = after[name.replace("sampler/", "policy/", 1)]
            torch.testing.assert_close(after[name], 0.75 * value + 0.25 * policy)
        elif name.startswith("old/"):
            assert torch.equal(after[name], value)


@pytest.mark.parametrize("kind", MAKE)
def test_gradients_are_finished_to_the_norm(kind):
    weights = MAKE[kind]()
    assert isinstance(weights, Weights) and not weights.sharded
    first, *others = weights.trained()
    first.grad = torch.full_like(first, 2.0)  # the others have none, as that of a block that leads nowhere
    norm = weights.finish_gradients(Ranks(), 0.5)
    assert norm == pytest.approx(2 * first.numel() ** 0.5)
    assert float(first.grad.norm()) == pytest.approx(0.5, rel=1e-5)
    assert all(parameter.grad is None for parameter in others)


def test_weights_say_what_they_lack():
    class Unfinished(FullWeights):
        blend = Weights.blend

    with pytest.raises(TypeError, match=r"Unfinished .*abstract method '?blend"):
        Unfinished(network())
    with pytest.raises(NotImplementedError, match="FullWeights: one set of weights for all rows"):
        FullWeights(network()).use_rows(["policy", "old"])


def test_only_the_policy_is_trained():
    weights = lora()
    state = weights.state()
    pointers = {parameter.data_ptr() for parameter in weights.trained()}
    assert pointers == {value.data_ptr() for name, value in state.items() if name.startswith("policy/")}
    base = [p for name, p in weights.network.named_parameters() if "lora_" not in name]
    assert not any(parameter.requires_grad for parameter in base)


def test_the_adapter_loads_in_diffusers_and_in_peft(tmp_path):
    weights = lora()
    train_a_little(weights)
    trained = forward(weights.network)
    weights.save_policy(tmp_path)
    with_diffusers = network()
    with_diffusers.load_lora_adapter(str(tmp_path / "diffusers"), use_safetensors=True)
    torch.testing.assert_close(forward(with_diffusers), trained)
    with_peft = PeftModel.from_pretrained(network(), tmp_path / "peft")
    torch.testing.assert_close(forward(with_peft), trained)


@pytest.mark.parametrize("folder, prefix", [("diffusers", "transformer."), ("peft", "base_model.model.")])
def test_the_tensors_of_an_adapter_have_its_full_strength(tmp_path, folder, prefix):
    """As loaders that read no metadata apply them: base + B A."""
    weights = LoraWeights(network(), rank=4, alpha=10, targets=TARGETS, seed=3)
    train_a_little(weights)
    weights.save_policy(tmp_path)
    (file,) = (tmp_path / folder).glob("*.safetensors")
    tensors = load_file(file)
    plain = network()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if (up := tensors.pop(f"{prefix}{name}.lora_B.weight", None)) is not None:
                module.weight += up @ tensors.pop(f"{prefix}{name}.lora_A.weight")
    assert not tensors
    torch.testing.assert_close(forward(plain), forward(weights.network))
    assert not torch.allclose(forward(plain), forward(network()), atol=1e-3)


def test_what_is_exported_leaves_the_weights_and_their_resuming_alone(tmp_path):
    weights = lora()
    train_a_little(weights)
    before = {name: value.clone() for name, value in weights.state().items()}
    optimizer = torch.optim.AdamW(weights.trained())
    checkpoint.save(tmp_path / "iteration-000001", weights, optimizer, {"iteration": 1}, keep=1)
    resumed = lora()
    checkpoint.load(tmp_path / "iteration-000001", resumed, torch.optim.AdamW(resumed.trained()))
    for state in (weights.state(), resumed.state()):
        assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_full_weights_load_in_diffusers(tmp_path):
    weights = FullWeights(network())
    train_a_little(weights)
    weights.save_policy(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    found, expected = loaded.state_dict(), weights.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    torch.testing.assert_close(forward(loaded), forward(weights.network))


def test_bfloat16_weights_with_snapshots_on_the_host(tmp_path):
    weights = HostWeights(network().bfloat16())
    state = weights.state()
    name = next(iter(dict(weights.network.named_parameters())))
    assert state[f"policy/{name}"].dtype == torch.bfloat16 and state[f"old/{name}"].dtype == torch.float32
    before = state[f"old/{name}"].clone()
    train_a_little(weights)
    weights.blend("old", 0.999)  # less than bfloat16 would hold
    expected = before.lerp(weights.state()[f"policy/{name}"].float(), 0.001)
    torch.testing.assert_close(weights.state()[f"old/{name}"], expected)
    policy = [parameter.detach().clone() for parameter in weights.trained()]
    weights.blend("old", 0.0)
    with weights.use("old"):
        assert all(torch.equal(a, b) for a, b in zip(policy, weights.trained()))
    with weights.use("reference"):
        assert not all(torch.equal(a, b) for a, b in zip(policy, weights.trained()))
    assert all(torch.equal(a, b) for a, b in zip(policy, weights.trained()))
    assert weights.is_policy("old")
    weights.state()[f"old/{name}"].mul_(1 + 2**-12)  # the network would have it rounded
    assert weights.is_policy("old")
    weights.state()[f"old/{name}"].mul_(1 + 2**-7)
    assert not weights.is_policy("old")
    weights.save_policy(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(policy, loaded.parameters()))


def test_targets_that_match_nothing():
    with pytest.raises(UserError, match="'to_qq' matches no linear layer of SD3Transformer2DModel"):
        LoraWeights(network(), 4, 4, ["attn.to_q", "to_qq"], seed=0)


def optimizers(parameters):
    import bitsandbytes

    yield torch.optim.AdamW(parameters, lr=1e-2)
    yield bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=64)


@pytest.mark.parametrize("index", [0, 1], ids=["adamw", "adamw8bit"])
def test_checkpoint_restores_weights_and_optimizer_to_the_bit(tmp_path, index):
    def step(weights, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in weights.trained():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    weights = lora()
    optimizer = list(optimizers(weights.trained()))[index]
    for seed in range(3):
        step(weights, optimizer, seed)
    weights.blend("old", 0.5)
    checkpoint.save(tmp_path / "iteration-000003", weights, optimizer, {"iteration": 3}, keep=1)

    other = lora()
    resumed = list(optimizers(other.trained()))[index]
    assert checkpoint.load(tmp_path / "iteration-000003", other, resumed)["iteration"] == 3
    for seed in (7, 8):
        step(weights, optimizer, seed)
        step(other, resumed, seed)
    found, expected = other.state(), weights.state()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    weights = lora()
    optimizer = torch.optim.AdamW(weights.trained())
    for iteration in (5, 10, 15):
        checkpoint.save(tmp_path / f"iteration-{iteration:06d}", weights, optimizer, {}, keep=2)
    kept = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert kept == ["iteration-000010", "iteration-000015"]
    assert not list(tmp_path.glob("partial-*"))


def test_an_incomplete_checkpoint_is_not_taken_for_one(tmp_path):
    (tmp_path / "checkpoints" / "partial-iteration-000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iteration-000008").mkdir()
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_another_models_state_changes_nothing():
    weights = lora()
    before = {name: value.clone() for name, value in weights.state().items()}
    state = {name: torch.zeros_like(value) for name, value in before.items()}
    last = sorted(state)[-1]
    state[last] = torch.zeros(1, 2, 3)
    with pytest.raises(UserError, match="expected shape"):
        weights.load_state(state)
    del state[last]
    with pytest.raises(UserError, match="another model"):
        weights.load_state(state)
    assert all(torch.equal(value, before[name]) for name, value in weights.state().items())
