"""The preference scorers on tiny models of the same classes, against computations of their own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from crd_fast.errors import UserError
from crd_fast.rewards import Rewards
from crd_fast.rewards.clip import MEAN, STD, Clip, preprocess
from crd_fast.rewards.preference import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore
from crd_fast.train.features import AT_ONCE, picture_features
from tests.rewards.preference_models import (
    SIDE,
    OpenClip,
    aesthetic_head,
    blip_state,
    blip_weights,
    randomized,
)

PROMPTS = ["a red dog", "two cats left of a bus", "a red dog", "x" * 200]


@pytest.fixture(scope="module")
def images():
    """Neither square nor of the models' size, each of a colour of its own."""
    rng = np.random.default_rng(0)
    colors = np.array([(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 250)])[:, None, None]
    return np.clip(colors + rng.integers(-80, 80, (4, 40, 56, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of a few thousand weights and a tokenizer of single letters, as the hub would have them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    layers = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    config = CLIPConfig(
        text_config=layers
        | {
            "vocab_size": len(words),
            "hidden_size": 24,
            "eos_token_id": len(words) - 1,
            "bos_token_id": len(words) - 2,
        },
        vision_config=layers | {"hidden_size": 32, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    model = randomized(CLIPModel(config), seed=1)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(clip_folder, images):
    """Transformers' own forward pass over the images and given texts, and its processor's pixels."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").pixel_values

    @torch.no_grad()
    def run(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)

    return run, pixels


def scored(reward, images, prompts=PROMPTS):
    """Its scores. Every one of its tensors can also be moved, as judges are between evaluations."""
    reward.setup("cpu")
    scores = reward.score(images, prompts, [{}] * len(prompts))
    reward.to("meta")
    places = {tensor.device.type for tensor in tensors_in(reward)}
    assert places == {"meta"}
    return scores


def tensors_in(value):
    """All that an object holds, to any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, Clip):
        return tensors_in(value.model)
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return tensors_in(list(vars(value).values())) if type(value).__module__.startswith("crd_fast") else []


def test_preprocessing_is_the_processors(images, theirs):
    torch.testing.assert_close(preprocess(images, SIDE), theirs[1], atol=1e-5, rtol=0)
    upright = images.transpose(0, 2, 1, 3)
    assert preprocess(upright, SIDE).shape == (4, 3, SIDE, SIDE)


def test_pickscore(clip_folder, images, theirs):
    expected = theirs[0](PROMPTS).logits_per_image.diagonal()
    got = scored(PickScore(str(clip_folder)), images)
    assert got == pytest.approx(expected.tolist(), rel=1e-4)
    assert expected.std() > 0.1  # the models are not so small that everything is alike


def test_clipscore(clip_folder, images, theirs):
    out = theirs[0]([f"A photo depicts {prompt}" for prompt in PROMPTS])
    cosines = (out.text_embeds * out.image_embeds).sum(dim=-1)
    expected = [2.5 * max(float(cosine), 0.0) for cosine in cosines]
    got = scored(CLIPScore(str(clip_folder)), images)
    assert got == pytest.approx(expected, abs=1e-5)
    assert min(cosines) < 0 < max(cosines)  # both sides of the clamp


def test_batches_and_repeated_prompts_change_nothing(clip_folder, images):
    for kind in (PickScore, CLIPScore):
        together = scored(kind(str(clip_folder)), images)
        alone = scored(kind(str(clip_folder), batch=1), images)
        assert alone == pytest.approx(together, rel=1e-4, abs=1e-5)
        swapped = scored(kind(str(clip_folder)), images[::-1].copy(), PROMPTS[::-1])
        assert swapped[::-1] == pytest.approx(together, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("single", [False, True])
def test_aesthetic(clip_folder, images, theirs, tmp_path, single):
    torch.manual_seed(0)
    head = nn.Linear(16, 1) if single else aesthetic_head(16)
    prefix = "" if single else "layers."
    torch.save({prefix + name: value for name, value in head.state_dict().items()}, tmp_path / "head.pth")
    with torch.no_grad():
        expected = head(theirs[0](PROMPTS).image_embeds)[:, 0].tolist()
    got = scored(Aesthetic(str(clip_folder), head=str(tmp_path / "head.pth")), images)
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_hpsv2(clip_folder, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    model = randomized(OpenClip(len(tokenizer)), seed=2)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    images = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)  # nothing to scale

    ids = tokenizer(PROMPTS, truncation=True, max_length=77).input_ids
    ids = torch.tensor([row + [0] * (77 - len(row)) for row in ids])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = F.cosine_similarity(model.text(ids), model.visual(pixels))
    got = scored(HPSv2(str(tmp_path), tokenizer=str(clip_folder)), images)
    assert got == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.02
    assert scored(HPSv2(str(tmp_path / "HPS_v2.1_compressed.pt"), str(clip_folder)), images) == got


def test_hpsv2_pads_what_is_not_square(clip_folder, tmp_path):
    model = randomized(OpenClip(1000), seed=2)
    torch.save(model.state_dict(), tmp_path / "HPS_v2.1_compressed.pt")
    reward = HPSv2(str(tmp_path), tokenizer=str(clip_folder))
    reward.setup("cpu")
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    for shape, band in (((64, 128), (8, 24)), ((16, 32), (8, 24)), ((33, 64), (8, 24))):
        pixels = reward._pixels(np.full((1, *shape, 3), 255, dtype=np.uint8))[0]
        assert pixels.shape == (3, SIDE, SIDE)
        torch.testing.assert_close(pixels[:, band[0] : band[1]], white[:, None, None].expand(3, 16, SIDE))
        torch.testing.assert_close(pixels[:, : band[0]], black[:, None, None].expand(3, 8, SIDE))
        torch.testing.assert_close(pixels[:, band[1] :], black[:, None, None].expand(3, 8, SIDE))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += ["##" + letter for letter in "abcdefghijklmnopqrstuvwxyz"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


def test_imagereward(bert_folder, tmp_path, images):
    from transformers import BertTokenizer

    weights = blip_weights()
    torch.manual_seed(4)
    head = aesthetic_head(64)  # the same layers, on the text's width
    state = {f"blip.{name}": value for name, value in weights.items()}
    state |= {f"mlp.layers.{name}": value for name, value in head.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, tmp_path / "ImageReward.pt")

    tokens = BertTokenizer.from_pretrained(bert_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        states = blip_state(weights, preprocess(images, SIDE), tokens.input_ids, tokens.attention_mask)
        expected = (head(states)[:, 0] - 0.16717362830052426) / 1.0333394966054072
    got = scored(ImageReward(str(tmp_path), tokenizer=str(bert_folder)), images)
    assert got == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert states.std(dim=0).mean() > 0.05


def test_that_it_reads_no_more_is_said_once(clip_folder, bert_folder, images, tmp_path, caplog):
    """Of the first prompt that is longer: training goes on for its beginning alone."""
    state = {f"blip.{name}": value for name, value in blip_weights().items()}
    state |= {f"mlp.layers.{name}": value for name, value in aesthetic_head(64).state_dict().items()}
    torch.save(state, tmp_path / "ImageReward.pt")
    reads = {"pickscore": 77, "imagereward": 35}
    for reward in (
        PickScore(str(clip_folder)),
        ImageReward(str(tmp_path), tokenizer=str(bert_folder)),
    ):
        caplog.clear()
        reward.setup("cpu")
        reward.score(images[:3], PROMPTS[:3], [{}] * 3)
        assert not caplog.messages
        for _ in range(2):
            reward.score(images, [*PROMPTS[:3], "a red dog " * 20], [{}] * 4)
        (message,) = caplog.messages
        most = reads[reward.name]
        assert message.startswith(f"warning: reward {reward.name}: reads the first {most} tokens of a prompt")
        assert int(message.split()[-1]) > most


def test_from_a_recipe(clip_folder, images):
    rewards = Rewards(
        {"pickscore": {"weight": 0.5, "path": str(clip_folder)}, "clipscore": {"path": str(clip_folder)}}
    )
    values = rewards.score(images, [{"prompt": prompt} for prompt in PROMPTS])
    assert values["pickscore"] == pytest.approx(scored(PickScore(str(clip_folder)), images), rel=1e-4)


def refused(reward):
    with pytest.raises(UserError) as error:
        reward.setup("cpu")
    message = str(error.value)
    assert message.startswith(f"reward {reward.name}: ") and "\n" not in message and len(message) < 400
    return message


def test_what_is_missing_is_named(clip_folder, bert_folder, tmp_path):
    assert "/nowhere: no such folder" in refused(PickScore("/nowhere"))
    assert "expected config.json in this folder" in refused(PickScore(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert "expected model.safetensors or pytorch_model.bin" in refused(PickScore(str(tmp_path)))
    assert "expected tokenizer.json or vocab.json" in refused(
        PickScore(str(clip_folder), tokenizer=str(tmp_path))
    )
    assert "expected HPS_v2.1_compressed.pt in this folder; it is on the hub" in refused(HPSv2(str(tmp_path)))
    assert "no such file or folder; expected HPS_v2.1_compressed.pt" in refused(HPSv2("/nowhere/HPS.pt"))
    assert "expected ImageReward.pt in this folder" in refused(ImageReward(str(tmp_path)))
    message = refused(Aesthetic(str(clip_folder), head="/nowhere.pth"))
    assert "no such file" in message and "sac+logos+ava1-l14-linearMSE.pth of christophschuhmann" in message


def test_weights_of_something_else_are_refused(clip_folder, bert_folder, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    for file in clip_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3  # one layer more than there are weights for
    (folder / "config.json").write_text(json.dumps(config))
    assert "found none for text_model.encoder.layers.2" in refused(PickScore(str(folder)))
    (folder / "model.safetensors").write_bytes(b"garbage")
    assert "expected a folder with config.json and model.safetensors" in refused(PickScore(str(folder)))

    file = tmp_path / "weights.pt"
    file.write_bytes(b"garbage")
    assert "expected a file of weights" in refused(HPSv2(str(file), tokenizer=str(clip_folder)))
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, file)
    assert "expected this scorer's own weights" in refused(HPSv2(str(file), tokenizer=str(clip_folder)))
    assert "expected this scorer's own weights" in refused(ImageReward(str(file), tokenizer=str(bert_folder)))
    assert "down to one number" in refused(Aesthetic(str(clip_folder), head=str(file)))
    torch.save([1, 2], file)
    assert "expected tensors by name" in refused(Aesthetic(str(clip_folder), head=str(file)))


def test_settings_are_checked():
    for kind in (PickScore, CLIPScore, Aesthetic, HPSv2, ImageReward):
        with pytest.raises(UserError, match="batch: expected at least 1, got 0"):
            kind(batch=0)


def test_pictures_of_evaluations_have_clips_features(clip_folder, images):
    clip = Clip("some", str(clip_folder), None, "cpu")
    many = np.concatenate([images] * (AT_ONCE // len(images) + 1))  # more than go through at once
    found = picture_features(str(clip_folder))(many)
    with torch.no_grad():
        expected = clip.images(preprocess(images, clip.size))
    assert found.shape == (len(many), 16) and found.dtype == np.float64
    assert found[-len(images) :] == pytest.approx(expected.numpy(), abs=1e-5)
