"""GenEval with Mask2Former and CLIP: tiny models of the same classes, the steps between them by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.prompts import coco
from crd_fast.prompts.geneval_metadata import draw_prompts
from crd_fast.rewards import Rewards
from crd_fast.rewards.geneval_detector import (
    ColorClassifier,
    Mask2Former,
    Mask2FormerGenEval,
    cut_out,
    instances,
)

DOG, CAT = coco.CLASSES.index("dog"), coco.CLASSES.index("cat")


@pytest.fixture(scope="module")
def mask2former_folder(tmp_path_factory):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    folder = tmp_path_factory.mktemp("mask2former")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=stages,
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=80,
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=layers
        | {"vocab_size": len(words), "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2},
        vision_config=layers | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(1)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def block(height, width, top, left, bottom, right, logit=4.0):
    """A mask's logits: `logit` inside the block, its negative outside."""
    mask = torch.full((height, width), -logit)
    mask[top:bottom, left:right] = logit
    return mask


def class_logits(*rows):
    """A row for each query: class index and probability, the rest of it for no object."""
    logits = torch.full((len(rows), 81), -30.0)
    for row, (index, probability) in zip(logits, rows):
        row[index], row[80] = np.log(probability), np.log(1 - probability)
    return logits


def test_an_instance_is_a_query_and_a_class_with_the_box_of_its_mask():
    masks = torch.stack([block(20, 30, 2, 3, 9, 12), block(20, 30, 10, 15, 20, 30)])
    found = instances(class_logits((DOG, 0.8), (CAT, 0.6)), masks)
    by_score = sorted(found, key=lambda d: -d["score"])
    inside = torch.sigmoid(torch.tensor(4.0)).item()
    assert [(d["label"], d["box"]) for d in by_score[:2]] == [
        ("dog", [3, 2, 12, 9]),
        ("cat", [15, 10, 30, 20]),
    ]
    assert [d["score"] for d in by_score[:2]] == pytest.approx([0.8 * inside, 0.6 * inside], rel=1e-4)
    assert by_score[0]["mask"].sum() == 7 * 9
    assert all(d["score"] < 1e-6 for d in by_score[2:])  # the other classes of the same queries


def test_the_score_is_the_class_times_the_mean_over_the_mask():
    mask = block(8, 8, 0, 0, 4, 4)
    mask[0, 0], mask[7, 7] = 0.0, 1.0  # 0 is not inside; a single pixel far away widens the box
    best = max(instances(class_logits((DOG, 0.9)), mask[None]), key=lambda d: d["score"])
    inside = [torch.sigmoid(torch.tensor(v)).item() for v in [4.0] * 15 + [1.0]]
    assert best["score"] == pytest.approx(0.9 * np.mean(inside), rel=1e-4)
    assert best["box"] == [0, 0, 8, 8]


def test_one_query_may_be_two_classes_and_an_empty_mask_is_nothing():
    logits = torch.full((2, 81), -30.0)
    logits[0, [DOG, CAT]] = np.log(0.5)
    logits[1, DOG] = 0.0
    found = instances(logits, torch.stack([block(8, 8, 1, 1, 5, 5), torch.full((8, 8), -3.0)]))
    assert sorted(d["label"] for d in found if d["score"] > 0.3) == ["cat", "dog"]
    many = class_logits(*[(DOG, 0.5)] * 5)
    assert len(instances(many, torch.ones(5, 4, 4))) == 100
    assert len(instances(many, torch.ones(5, 4, 4), least=0.3)) == 5


def test_an_object_is_cut_out_on_grey():
    image = np.full((10, 12, 3), 200, dtype=np.uint8)
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:6, 3:7], mask[2, 3] = True, False
    crop = cut_out(image, mask, [3, 2, 7, 6])
    blank = Image.new("RGB", (12, 10), color="#999")
    expected = Image.composite(Image.fromarray(image), blank, Image.fromarray(mask)).crop((3, 2, 7, 6))
    assert crop.size == (4, 4) and np.array_equal(np.array(crop), np.array(expected))
    assert crop.getpixel((0, 0)) == (153, 153, 153) and crop.getpixel((1, 1)) == (200, 200, 200)


def test_pixels_are_scaled_as_the_benchmark_does(mask2former_folder):
    detector = Mask2Former(str(mask2former_folder), "cpu")
    for shape, size, padded in (
        ((512, 512), (800, 800), (800, 800)),
        ((32, 32), (800, 800), (800, 800)),
        ((512, 768), (800, 1200), (800, 1216)),
        ((300, 900), (444, 1333), (448, 1344)),  # the longer side decides: 1333 / 900
    ):
        pixels, unpadded = detector.pixels(np.full((1, *shape, 3), 128, dtype=np.uint8))
        assert unpadded == size and pixels.shape == (1, 3, *padded)
        inside = pixels[..., : size[0], : size[1]]
        expected = [(128 - m) / s for m, s in zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))]
        torch.testing.assert_close(inside.mean(dim=(0, 2, 3)), torch.tensor(expected), atol=1e-4, rtol=0)
        assert pixels.sum() == pytest.approx(inside.sum().item(), rel=1e-4)  # the padding is 0


def test_detections_are_those_of_the_models_own_processor(mask2former_folder):
    """Boxes and masks at the image's size; scores as transformers' instance segmentation has them."""
    from transformers import Mask2FormerForUniversalSegmentation

    detector = Mask2Former(str(mask2former_folder), "cpu")
    detector.least = 0.0  # random weights are sure of nothing
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former_folder).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    with torch.no_grad():
        found = detector(images)
        out = model(pixel_values=detector.pixels(images)[0])
    assert all(len(detections) > 10 for detections in found)
    for detections, logits, masks in zip(found, out.class_queries_logits, out.masks_queries_logits):
        masks = torch.nn.functional.interpolate(masks[None], (800, 800), mode="bilinear")
        masks = torch.nn.functional.interpolate(masks, (24, 24), mode="bilinear")[0]
        probabilities = logits.softmax(-1)
        for detection in detections[:10]:
            label = coco.CLASSES.index(detection["label"])
            matches = []
            for query, mask in enumerate(masks):
                inside = mask > 0
                if inside.any() and np.array_equal(inside.numpy(), detection["mask"]):
                    matches.append(float(probabilities[query, label] * mask.sigmoid()[inside].mean()))
            assert detection["score"] == pytest.approx(
                min(matches, key=lambda m: abs(m - detection["score"])), rel=1e-3
            )
            rows, columns = np.nonzero(detection["mask"])
            assert detection["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_colours_are_clips_zero_shot_choice(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    image = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    boxes = [[0, 0, 20, 20], [5, 10, 40, 30], [20, 20, 40, 40], [0, 0, 40, 9]]
    detections = []
    for label, (left, top, right, bottom) in zip(["dog", "cat", "dog", "wine glass"], boxes):
        mask = np.zeros((40, 40), dtype=bool)
        mask[top:bottom, left:right] = True
        detections.append({"label": label, "box": [left, top, right, bottom], "mask": mask})

    colors = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    expected = []
    with torch.no_grad():
        for d in detections:
            crop = Image.fromarray(image).crop(d["box"])
            embedding = model(
                pixel_values=processor(images=crop, return_tensors="pt").pixel_values,
                input_ids=torch.tensor([[0, 1]]),
            ).image_embeds[0]
            scores = []
            for c in colors:
                name = d["label"]
                texts = [
                    f"a photo of a {c} {name}",
                    f"a photo of a {c}-colored {name}",
                    f"a photo of a {c} object",
                ]
                tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
                embeds = model(**tokens, pixel_values=torch.zeros(1, 3, 16, 16)).text_embeds
                mean = embeds.mean(dim=0)
                scores.append(float(embedding @ (mean / mean.norm())))
            expected.append(colors[int(np.argmax(scores))])
        assert ColorClassifier(str(clip_folder), "cpu")(image, detections) == expected
    assert ColorClassifier(str(clip_folder), "cpu")(image, []) == []


@pytest.fixture
def reward(mask2former_folder, clip_folder):
    reward = Mask2FormerGenEval(str(mask2former_folder), clip=str(clip_folder))
    reward.setup("cpu")
    return reward


def test_the_reward_judges_what_was_detected(reward, monkeypatch):
    """Detections are put in the models' place: what is asked, judged and named is the reward's."""

    def found(label, score, left):
        mask = np.zeros((32, 64), dtype=bool)
        mask[:10, left : left + 10] = True
        return {"label": label, "box": [left, 0, left + 10, 10], "score": score, "color": None, "mask": mask}

    asked = []

    def colors(image, detections):
        asked.append([(d["label"], d["score"]) for d in detections])
        return ["red" for _ in detections]

    scene = [found("dog", 0.9, 0), found("dog", 0.2, 5), found("cat", 0.8, 50)]
    monkeypatch.setattr(reward, "detector", lambda images: [list(map(dict, scene)) for _ in images])
    monkeypatch.setattr(reward, "colors", colors)
    metadata = [
        coco.single_object("dog"),
        coco.two_object("dog", "bus"),
        coco.counting("dog", 2),
        coco.colors("red", "dog"),
        coco.colors("blue", "dog"),
        coco.position("dog", "left of", "cat"),
        coco.color_attr("red", "dog", "white", "cat"),
    ]
    images = np.zeros((len(metadata), 32, 64, 3), dtype=np.uint8)
    reward.check(metadata)
    scores = reward.score(images, [entry["prompt"] for entry in metadata], metadata)
    assert scores == pytest.approx([1, 0.5, 0, 1, 0.5, 1, 0.75])  # counting: 0.9 is not above 0.9
    assert asked == [[], [], [], [("dog", 0.9)], [("dog", 0.9)], [], [("dog", 0.9), ("cat", 0.8)]]
    reward.strict = True
    assert reward.score(images, [], metadata) == [1, 0, 0, 1, 0, 1, 0]
    report = reward.report(images, [], metadata)
    assert (report["colors"], report["position"], report["two_object"]) == (0.5, 1.0, 0.0)


def test_end_to_end_from_a_recipe(mask2former_folder, clip_folder):
    metadata = draw_prompts(coco.prompts(True), np.random.default_rng(0), 6)
    images = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    settings = {"path": str(mask2former_folder), "clip": str(clip_folder), "batch": 4}
    rewards = Rewards({"geneval_mask2former": settings}, device="cpu")
    rewards.check(metadata)
    assert rewards.score(images, metadata)["geneval_mask2former"].shape == (6,)


def test_what_is_never_detected_is_refused(reward):
    entry = coco.single_object("dog")
    with pytest.raises(UserError, match=r"'computer mous' is none of the 80 classes.*'computer mouse'"):
        reward.check([entry, coco.single_object("computer mous")])
    with pytest.raises(UserError, match="'gray' is none of the 10 colours"):
        reward.check([entry, coco.colors("gray", "dog")])
    with pytest.raises(UserError, match="include: expected a list"):
        reward.check([{"prompt": "a dog"}])


def test_a_detector_of_other_classes_is_refused(clip_folder):
    with pytest.raises(UserError, match="expected weights of a Mask2Former") as refused:
        Mask2Former(str(clip_folder), "cpu")
    assert "\n" not in str(refused.value)
