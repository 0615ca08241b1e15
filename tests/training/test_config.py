"""Recipes: every mistake is one line that names the key and what was wanted."""

import math
import re

import pytest

from crd_fast.config import RECIPES, Recipe, build_recipe, load_recipe, recipe_names
from crd_fast.errors import UserError
from crd_fast.hints import MEANINGS
from crd_fast.schema import Schedule
from crd_fast.yaml_files import parse_yaml


@pytest.mark.parametrize("reward", ["0", "-0.0", "{weight: 0}"])
def test_rewards_that_train_nothing(reward):
    recipe = load_recipe("builtin", [f"rewards={{geneval: {reward}, colorfulness: 0}}"])
    recipe.check_own(trains=False, evaluates=True)
    with pytest.raises(UserError, match="rewards: expected one of a weight other than 0, got none"):
        recipe.check_own(trains=True, evaluates=True)
    load_recipe("builtin", ["rewards={geneval: {}, colorfulness: 0}"]).check_own(True, True)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_defaults_are_the_published_recipe():
    recipe = Recipe()
    assert recipe.loss.temperature == math.inf and recipe.loss.guidance_scale == 4.5
    assert (recipe.rollout.samples_per_prompt, recipe.rollout.prompts_per_iteration) == (24, 48)
    assert recipe.training_steps() == list(range(10))


def test_a_range_of_timesteps_ends_where_it_says():
    for share, steps in ((0.28, 25), (0.14, 50), (0.07, 100)):  # each a little more than 7 in floating point
        recipe = load_recipe("builtin", [f"train.timestep_range={share}", f"rollout.steps={steps}"])
        assert recipe.training_steps() == list(range(7))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.betta=3"], "unknown key 'loss.betta', did you mean 'beta'?"),
        (["lsos.beta=3"], "unknown section 'lsos', did you mean 'loss'?"),
        (["loss.beta"], "expected section.key=value"),
        (["loss.beta=high"], "loss.beta: expected a valid number"),
        (["loss.beta=0"], "loss.beta: expected greater than 0, got 0"),
        (["loss.kl_min=0.2"], "kl_min: expected at most kl_beta (0.1), got 0.2"),
        (
            ["rollout.samples_per_prompt=1"],
            "rollout.samples_per_prompt: expected greater than or equal to 2, got 1",
        ),
        (["train.timesteps=11"], "train.timesteps: expected all or 1 to 10"),
        (["train.timesteps=some"], "train.timesteps: expected"),
        (["train.micro_batch=0"], "train.micro_batch: expected auto or at least 1, got 0"),
        (["train.steps_per_iteration=49"], "expected at most rollout.prompts_per_iteration (48), got 49"),
        (["snapshots.old=0/0.25"], "snapshots.old: expected begin/start/slope/end"),
        (["snapshots.old=0/0.25/0.005/2"], "decays between 0 and 1"),
        (["model.quantization=int4"], "model.quantization: expected 'none', 'int8' or 'nf4', got 'int4'"),
        (
            ["loss.method=ppo"],
            "loss.method: expected 'crd', 'nft', 'awm', 'flow_matching' or 'dpo', got 'ppo'",
        ),
        (["loss.method=nft", "loss.temperature=1"], "temperature: expected inf with method nft, got 1.0"),
        (["loss.clip_range=0.1"], "clip_range: expected null with method crd, got 0.1"),
        (["loss.centering_batch=2"], "centering_batch: expected null with centering prompt, got 2"),
        (
            ["loss.centering=none", "loss.temperature=0.5"],
            "temperature: expected inf with centering none, got 0.5",
        ),
        (
            ["loss.norm_penalty=1", "loss.kl_beta=0", "loss.kl_min=0"],
            "norm_penalty: expected 0 without an anchor (kl_beta 0), got 1",
        ),
        (
            ["loss.norm_penalty=1", "train.backward_fraction=0.5"],
            "train.backward_fraction: expected 1.0 with loss.norm_penalty, got 0.5",
        ),
        (["rewards.geneval=.nan"], "rewards: geneval: expected a finite weight"),
        (
            ["eval_rewards={ocr: -1}"],
            "eval_rewards: ocr: expected no weight below 0, got -1: of a judge more is",
        ),
        (["rewards.ocr.timeout=.inf"], "rewards: ocr: timeout: expected a finite number, got inf"),
        (["train.learning_rate=true"], "train.learning_rate: expected a number, got true"),
        (["train.iterations=no"], "train.iterations: expected a number, got false"),
        (["train.timesteps=yes"], "train.timesteps: expected a number, got true"),
        (["evaluate.max_prompts=on"], "evaluate.max_prompts: expected a number, got true"),
        (["train.learning_rate=.inf"], "train.learning_rate: expected a finite number, got inf"),
        (["train.learning_rate='inf'"], "train.learning_rate: expected a finite number, got 'inf'"),
        (["train.weight_decay=.nan"], "train.weight_decay: expected a finite number, got nan"),
        (["train.max_grad_norm=1e999"], "train.max_grad_norm: expected a finite number, got inf"),
        (["loss.temperature=.nan"], "loss.temperature: expected greater than 0, got nan"),
        (["loss.temperature=-.inf"], "loss.temperature: expected greater than 0, got -inf"),
        (["loss.beta=.inf"], "loss.beta: expected a finite number, got inf"),
        (["checkpoint.minutes=.inf"], "checkpoint.minutes: expected a finite number, got inf"),
        (["evaluate.guidance_scale=1e39"], "evaluate.guidance_scale: expected at most 3.4e+38, got 1e+39"),
        (["loss.beta=1e300"], "loss.beta: expected at most 3.4e+38, got 1e+300"),
        ([f"model.lora_rank={10**400}"], "model.lora_rank: expected less than or equal to 16384, got 1000"),
        (["train.timesteps=9223372036854775808"], "expected at most 1e+06, got 9223372036854775808"),
        (["train.seed=9223372036854775808"], "train.seed: expected at most 9.22e+18, got 92233720"),
        ([f"rollout.samples_per_prompt={10**15}"], "rollout.samples_per_prompt: expected at most 1e+06, got"),
        ([f"model.text_length={10**7}"], "model.text_length: expected at most 1e+06, got 10000000"),
        (
            ["rollout.samples_per_prompt=100000", "rollout.prompts_per_iteration=11"],
            "rollout.samples_per_prompt: expected at most 1000000 pictures an iteration, got 100000 of each",
        ),
        ([f"rollout.resolution=[512, {10**15}]"], "rollout.resolution: expected sides of at most 32768 pix"),
        ([f"evaluate.resolution={10**5}"], "evaluate.resolution: expected sides of at most 32768 pixels, go"),
        (["model.lora_rank=1e300"], "model.lora_rank: expected a smaller number, got 1e+300"),
        (["rollout.steps=100000000000"], "rollout.steps: expected less than or equal to 1000, got 100000"),
        (
            ["train.iterations=017"],
            "--set train.iterations=017: 017 means 15 in YAML: write",
        ),
        (["train.iterations=018"], "train.iterations: expected a number without zeros before it, got 018"),
        (["train.iterations=1:30"], "1:30 means 90 in YAML"),
        (["train.iterations=2026-99-01"], "is not YAML: month must be in 1..12"),
        (["snapshots.old=0/0.25/-0.005/0.999"], "snapshots.old: expected a finite slope of at least 0"),
        (["snapshots.old=0/0.25/nan/0.999"], "snapshots.old: expected a finite slope of at least 0"),
        (["snapshots.old=0/0.25/inf/0.999"], "snapshots.old: expected a finite slope of at least 0"),
        (["snapshots.sampler=0/nan/0.1/0.999"], "snapshots.sampler: expected begin >= 0 and decays between"),
        (["loss={beta: 1, beta: 2}"], "--set loss={beta: 1, beta: 2}: 'beta' stands twice"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError) as error:
        build_recipe({}, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_seed_may_be_any_that_torch_takes():
    assert build_recipe({}, [f"train.seed={2**63 - 1}"]).train.seed == 2**63 - 1


@pytest.mark.parametrize(
    "override, served",
    [
        ("train.lr=1e-4", "unknown key 'train.lr'; here that is train.learning_rate"),
        ("train.batch_size=8", "rollout.prompts_per_iteration and rollout.samples_per_prompt"),
        ("train.max_steps=5", "train.iterations"),
        ("model.rank=8", "model.lora_rank"),
        ("model.lora_path=x", "model.init_lora"),
        ("train.gradient_accumulation_steps=4", "train.micro_batch"),
        ("train.gradient-accumulation-steps=4", "train.micro_batch"),
        ("train.report_to=wandb", "train.trackers"),
        ("train.samples_per_prompt=4", "rollout.samples_per_prompt"),
        (
            "train.guidance_scale=4",
            "rollout.guidance_scale or loss.guidance_scale or evaluate.guidance_scale",
        ),
        ("loss.resolution=1024", "rollout.resolution and evaluate.resolution"),
        ("lr=1e-4", "unknown section 'lr'; here that is train.learning_rate"),
        ("rollout.resolution=512x768", "expected a side in pixels or [height, width], got 512x768"),
        ("rollout.resolution=[512, 4]", "expected sides of at least 8 pixels, got [512, 4]"),
        ("rollout.resolution=[]", "expected a side in pixels or [height, width], got []"),
        ("rollout.resolution=[512, 640, wide]", "expected a side in pixels or [height, width], got wide"),
        ("evaluate.resolution=[[512, 768], 512]", "expected a side in pixels or [height, width], got [["),
        ("evaluate.resolution=7", "expected sides of at least 8 pixels, got 7"),
    ],
)
def test_names_of_other_trainers_lead_to_what_serves_here(override, served):
    with pytest.raises(UserError) as error:
        build_recipe({}, [override])
    assert served in str(error.value) and "did you mean" not in str(error.value)
    assert "\n" not in str(error.value)


def test_every_hint_names_keys_that_there_are():
    keys = {f"{section}.{key}" for section, values in Recipe().model_dump().items() for key in values or ()}
    for meaning in MEANINGS.values():
        named = re.findall(r"\b(?:model|rollout|loss|snapshots|train|evaluate|checkpoint)\.\w+", meaning)
        assert set(named) <= keys


def test_a_reward_has_its_settings_and_all_rewards_are_replaced():
    recipe = build_recipe({"rewards": {"ocr": 2.0}}, ["rewards.ocr.mode=word", "rewards.my.mod:f=1"])
    assert recipe.rewards == {"ocr": {"weight": 2.0, "mode": "word"}, "my.mod:f": 1}
    assert build_recipe({"rewards": {"ocr": 2.0}}, ["rewards={my.mod:f: 1}"]).rewards == {"my.mod:f": 1}


def test_several_keys_of_a_section_leave_the_others():
    base = load_recipe("builtin")
    recipe = load_recipe("builtin", ["train={seed: 3, iterations: 2}"])
    assert recipe.train == base.train.model_copy(update={"seed": 3, "iterations": 2})


def test_text_that_looks_like_a_number_survives_a_round_trip():
    for text in ("12e4567", "1.e5", "1e5", "7e3", "017", "1:30", "yes", "null", "2024-01-01", "0x1f", "😀"):
        recipe = build_recipe({"rewards": {"my.mod:f": {"tag": text}}, "model": {"prompt_cache": text}})
        assert build_recipe(parse_yaml(recipe.to_yaml(), "here")) == recipe


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {learning_rate: 3e-4}\nloss: {temperature: .inf}\n")
    recipe = load_recipe(path, ["loss.kl_beta=1e-2"])
    assert recipe.train.learning_rate == 3e-4 and recipe.loss.kl_beta == 0.01


@pytest.mark.parametrize(
    "content, message",
    [
        (b"train: [1, 2", "is not YAML"),
        (b"- train\n- loss", "expected sections with keys, got list"),
        (b"train: \xff\xfe", "expected UTF-8"),
        (b"train: 3", "train: expected"),
        (b"loss:\n  beta: 1\n  kl_beta: 0.1\n  beta: 2\n", "line 4: 'beta' stands twice, first in line 2"),
        (b"loss: {beta: 1}\ntrain: {seed: 1}\nloss: {kl_beta: 0.1}\n", "line 3: 'loss' stands twice"),
        (b"train:\n  seed: 017\n", "line 2: 017 means 15 in YAML"),
        (b"train:\n  seed: 1\n  date: 2026-99-01\n", "is not YAML: month"),
        (b"rewards: {ocr: {weight: 1, weight: 2}}", "'weight' stands twice"),
        (b"loss: " + b"[" * 5000, "is not YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'builtin'"):
        load_recipe("buitlin")
    assert RECIPES.is_dir()


def test_schedule():
    old = Schedule.parse("0/0.25/0.005/0.999")
    assert [old(0), old(10), old(1000)] == [0.25, pytest.approx(0.3), 0.999]
    sampler = Schedule.parse("75/0/0.0075/0.999")
    assert [sampler(0), sampler(74), sampler(75), sampler(85)] == [0, 0, 0, pytest.approx(0.075)]


def test_a_recipe_extends_another(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: sd3.5-medium-24gb\nrewards: {jpeg_compressibility: 1.0}\ntrain: {iterations: 7}\n"
    )
    base, recipe = load_recipe("sd3.5-medium-24gb"), load_recipe(mine)
    assert recipe.rewards == {"jpeg_compressibility": 1.0}  # replaced, not added to
    assert recipe.train == base.train.model_copy(update={"iterations": 7})
    assert (recipe.model, recipe.rollout, recipe.loss) == (base.model, base.rollout, base.loss)
    (tmp_path / "deeper").mkdir()
    further = tmp_path / "deeper" / "further.yaml"
    further.write_text("extends: ../mine.yaml\ntrain: {seed: 5}\n")
    assert load_recipe(further, ["train.iterations=3"]).train == base.train.model_copy(
        update={"iterations": 3, "seed": 5}
    )


def test_a_folder_called_like_a_recipe_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin").mkdir()
    (tmp_path / "mine.yaml").write_text("extends: builtin\n")
    assert load_recipe("builtin") == load_recipe("mine.yaml")


def test_what_a_file_extends_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("train: {seed: 5}\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "mine.yaml").write_text("extends: base.yaml\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"deeper/base\.yaml: no such file"):
        load_recipe("deeper/mine.yaml")


@pytest.mark.parametrize(
    "base, message",
    [
        ("mine.yaml", "mine.yaml: extends: mine.yaml leads back to this file"),
        ("round.yaml", "round.yaml: extends: mine.yaml leads back to this file"),
        ("builtn", "no file or recipe called 'builtn'.*builtin"),
        ("[builtin]", r"extends: expected a recipe's file or name, got \['builtin'\]"),
    ],
)
def test_what_cannot_be_extended(tmp_path, base, message):
    (tmp_path / "mine.yaml").write_text(f"extends: {base}\n")
    (tmp_path / "round.yaml").write_text("extends: mine.yaml\n")
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "mine.yaml")
