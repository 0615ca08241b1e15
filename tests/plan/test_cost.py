"""What a run costs: FLOPs against a real update, hours against arithmetic, disk against real files."""

import inspect
import json
import math

import pytest
import torch

from crd_fast.plan import text
from crd_fast.plan.cost import DEFAULTS, SLOW_REWARDS, cost, evaluations, reward_seconds
from crd_fast.plan.forwards import Flops
from crd_fast.plan.gpus import BY_NAME
from crd_fast.plan.planner import Plan, Planner
from crd_fast.rewards.easyocr import EasyOCR
from crd_fast.rewards.ocr import OCR, OCRDense
from crd_fast.run.row_counts import RowCounts, flops_of
from crd_fast.train.update import Updater
from crd_fast.weights import checkpoint
from tests.plan.conftest import GROUP, PROMPTS, Real, pairs_of

PLAIN = ("train.precision=fp32", "train.checkpointing=false")


def counted(real, recipe, micro_batch):
    """Rows and FLOPs of a real update of two groups."""
    rows, flops = RowCounts(), Flops()
    updater = Updater(
        real.model,
        real.weights,
        recipe.loss,
        advantage_clip=5.0,
        precision=recipe.train.precision,
        micro_batch=micro_batch,
        backward_fraction=recipe.train.backward_fraction,
        kept_graphs=recipe.train.kept_graphs,
        observer=rows,
    )
    with flops:
        updater.accumulate(pairs_of(2), torch.randn(2 * GROUP, 3, 32, 32), real.embeddings, real.empty)
    return rows.rows, flops.total


@pytest.mark.parametrize(
    "micro_batch, checkpointing, less",
    [
        (GROUP, "true", "train.kept_graphs=none"),
        (GROUP, "false", "train.backward_fraction=0.5"),
        (4, "false", "train.kept_graphs=none"),
        (4, "true", "train.kept_graphs=none"),
        (4, "true", "train.kept_graphs=device"),  # a group that is not split has one graph anyway
        (4, "true", "train.backward_fraction=0.5"),
    ],
)
def test_rows_and_their_flops_are_those_of_a_real_update(recipe, micro_batch, checkpointing, less):
    settings = recipe("builtin", *PLAIN[:1], f"train.checkpointing={checkpointing}", less)
    plan = Planner(settings).plan(micro_batch, 2)
    rows, flops = counted(Real(settings), settings, micro_batch)
    pairs = PROMPTS * GROUP * settings.rollout.steps
    for branch, gradient in [("old", False), ("reference", False), ("policy", True), ("policy", False)]:
        kind = f"{branch}_with_gradient" if gradient else branch
        assert plan.rows.get(kind, 0) / pairs == rows[branch, gradient] / (2 * GROUP), kind
    assert flops_of(rows, plan.row_flops) == pytest.approx(flops, rel=0.01)
    assert plan.flops["update"] / pairs == pytest.approx(flops / (2 * GROUP), rel=0.01)


def test_pairs_that_are_not_anchored_cost_no_reference(recipe):
    whole = Planner(recipe("builtin", *PLAIN)).plan(2, 2)
    half = Planner(recipe("builtin", *PLAIN, "loss.anchor_fraction=0.5")).plan(2, 2)
    saved = whole.rows["reference"] / 2 * whole.row_flops["reference"]
    assert half.rows["reference"] == whole.rows["reference"] / 2
    assert half.flops["update"] == pytest.approx(whole.flops["update"] - saved)
    assert saved > 0.1 * whole.flops["update"]


@pytest.mark.parametrize("size", ["null", "4", "18"])
def test_whatever_is_centered_together_each_pair_is_run_once(recipe, size):
    batch = ("loss.centering=batch", f"loss.centering_batch={size}")
    plain, mixed = (Planner(recipe("builtin", *PLAIN, *more)).plan(2, 2) for more in ((), batch))
    assert mixed.rows == plain.rows and mixed.flops == pytest.approx(plain.flops)


def test_samples_that_are_too_certain_for_an_anchor_cost_no_reference(recipe):
    drawn = ("loss.anchor_fraction=0.5", "rewards={geneval: 1.0, diversity: 0.0}")
    whole, uncertain = (
        Planner(recipe("builtin", *PLAIN, *drawn, f"loss.anchor_uncertain={share}")).plan(2, 2)
        for share in (1, 0.25)
    )
    assert uncertain.rows["reference"] == whole.rows["reference"] / 2


def a_plan(**changes):
    """An iteration of 10 PFLOP rollout, 2 PFLOP decode, 40 PFLOP update."""
    rows = {"sampler": 1000, "decode": 100, "policy_with_gradient": 2000}
    row_flops = {"sampler": 1e13, "decode": 2e13, "policy_with_gradient": 2e13}
    sizes = {"prompt": 1000, "checkpoint": 5000}
    return Plan({}, 1, 1, 0, 0, rows=rows, row_flops=row_flops, sizes=sizes, **changes)


RUN = ("train.precision=bf16", "train.iterations=30", "checkpoint.every=10")
SMALL = ("rollout.prompts_per_iteration=20", "rollout.samples_per_prompt=5", "evaluate.steps=10")


def run_cost(recipe, plan=None, card="h100", *overrides, **arguments):
    evaluated = ("evaluate.every=20", "evaluate.max_prompts=40")
    return cost(
        recipe("builtin", *RUN, *SMALL, *evaluated, *overrides), plan or a_plan(), BY_NAME[card], **arguments
    )


def test_hours_are_flops_over_the_cards_peak(recipe):
    peak = BY_NAME["h100"].tflops * 1e12
    found = run_cost(recipe, efficiency=0.25)
    assert found.bound == pytest.approx(52e15 / peak)
    assert found.iteration == pytest.approx(52e15 / peak / 0.25)
    evaluation = 40 * (10 * 1e13 + 2e13) / peak / 0.25  # 40 pictures of 10 steps
    assert found.evaluation == pytest.approx(evaluation)
    guided = 40 * (20 * 1e13 + 2e13) / peak / 0.25  # the base once more, with guidance
    # iterations 0, 20 and the last are evaluated, 0 and 10 stand before the first checkpoint
    assert found.hours == pytest.approx((30 * found.iteration + 3 * evaluation + guided) / 3600)
    without = run_cost(recipe, None, "h100", "evaluate.guided_base=false", efficiency=0.25)
    assert without.hours == pytest.approx(found.hours - guided / 3600)
    assert found.flops - without.flops == pytest.approx(40 * 22e13)
    # drift takes three forwards a picture, or two; features draw the guided base's pictures once
    drifts = [run_cost(recipe, None, "h100", f"evaluate.drift={scale}") for scale in (4.5, 1)]
    of_one = [drift.evaluation_flops - found.evaluation_flops for drift in drifts]
    assert of_one == pytest.approx([40 * 3e13, 40 * 2e13])
    asked = ("evaluate.drift=4.5", "evaluate.features=random", "evaluate.guided_base=false")
    alone = run_cost(recipe, None, "h100", *asked)
    assert alone.guided_base_flops == pytest.approx(40 * 22e13)
    assert (alone.guided_base_scored, found.guided_base_scored) == (0, 40)
    # the base's evaluation has drawn them already where it has that guidance
    for scale, drawn in ((4.5, 1), (3.0, 2)):
        both = run_cost(recipe, None, "h100", f"evaluate.drift={scale}", "evaluate.features=random")
        assert both.guided_base_flops == pytest.approx(drawn * 40 * 22e13)
    # the first one comes after 20 minutes, or after 10 iterations
    first = math.ceil(20 * 60 / found.iteration)
    assert first < 10
    assert found.hours_to_checkpoint == pytest.approx(
        (first * found.iteration + 1 * evaluation + guided) / 3600
    )
    rare = run_cost(recipe, None, "h100", "checkpoint.minutes=1000", efficiency=0.25)
    assert rare.hours_to_checkpoint == pytest.approx((10 * found.iteration + 1 * evaluation + guided) / 3600)
    assert found.bound_hours == pytest.approx(found.hours * 0.25)


def test_a_slow_reward_is_waited_for_only_beyond_the_rollout(recipe):
    """Pictures are scored while others are generated."""
    fast = run_cost(recipe, card="rtx-3060")
    slow = run_cost(recipe, None, "rtx-3060", "rewards.ocr={mode: scene}")
    assert slow.iteration == fast.iteration  # 35 s of reading beside 1,177 s of rollout
    fast, slow = run_cost(recipe), run_cost(recipe, None, "h100", "rewards.ocr={mode: scene}")
    rollout = 12e15 / (BY_NAME["h100"].tflops * 1e12 * 0.4)
    assert slow.iteration == pytest.approx(fast.iteration - rollout + 100 * 0.35)
    assert slow.evaluation == pytest.approx(fast.evaluation + 40 * 0.35)
    judged = run_cost(recipe, None, "h100", "eval_rewards.easyocr={mode: scene}")
    seconds = SLOW_REWARDS["easyocr", "scene"]
    assert judged.iteration == fast.iteration
    assert judged.evaluation == pytest.approx(fast.evaluation + 40 * seconds)
    scored = judged.evaluations * 40 + judged.guided_base_scored
    assert judged.hours == pytest.approx(fast.hours + scored * seconds / 3600)


def test_streamed_blocks_come_over_the_link(recipe):
    card = BY_NAME["rtx-4060"]
    link, rollout = card.link * 1e9, 12e15 / (card.tflops * 1e12)
    assert link == pytest.approx(8 * 1.969e9)
    of_update = run_cost(recipe, a_plan(streamed_bytes=1e15), card.name)
    assert of_update.bound == pytest.approx(rollout + 1e15 / link)
    # 100 pictures one by one in 3 steps, and of an evaluation 40 in 10
    plan = a_plan(streamed_bytes=301 * 1e12, forward_bytes=1_000_000_000_000)
    slow, fast = run_cost(recipe, plan, card.name), run_cost(recipe, None, card.name)
    assert slow.bound == pytest.approx(300 * 1e12 / link + 40e15 / (card.tflops * 1e12))
    assert slow.evaluation == pytest.approx(400 * 1e12 / link) and slow.evaluation > fast.evaluation
    assert slow.hours == pytest.approx(
        (30 * slow.iteration + slow.evaluations * slow.evaluation) / 3600
        + (slow.guided_base_forwards * 1e12 / link) / 3600
    )
    assert (
        run_cost(recipe, a_plan(streamed_bytes=1e9), card.name).bound
        == run_cost(recipe, None, card.name).bound
    )


def test_no_estimate_for_float32_and_no_hours_without_a_card(recipe):
    wide = run_cost(recipe, None, "h100", "train.precision=fp32")
    assert wide.iteration is None and wide.hours is None and wide.bound_hours > 0
    assert "no estimate" in text.iteration_line(wide)
    unnamed = cost(recipe("builtin", *RUN), a_plan())
    assert unnamed.bound is None and unnamed.hours is None


@pytest.mark.parametrize("every, iterations", [(0, 5), (2, 5), (5, 5), (7, 5), (1, 3)])
def test_evaluations_are_those_of_the_loop(every, iterations):
    due = [i for i in range(1, iterations + 1) if every and (i % every == 0 or i == iterations)]
    for until in range(iterations + 1):
        expected = bool(every) + sum(i <= until for i in due)
        assert evaluations(every, until, iterations) == expected


def test_rewards_that_are_slow():
    assert reward_seconds("ocr", 1.0) == reward_seconds("ocr", {"mode": "scene", "weight": 2}) == 0.35
    assert reward_seconds("ocr", {"mode": "word"}) == reward_seconds("ocr_dense", 1.0) == 0
    assert reward_seconds("ocr", {"side": 320}) == reward_seconds("geneval", 1.0) == 0
    scene = {"mode": "scene"}
    assert reward_seconds("easyocr", scene) == reward_seconds("easyocr", scene | {"side": 512}) == 2.1
    assert reward_seconds("easyocr", {}) == reward_seconds("easyocr", scene | {"side": 320}) == 0


def test_defaults_of_slow_rewards_are_theirs():
    for name, reward in (("ocr", OCR), ("ocr_dense", OCRDense), ("easyocr", EasyOCR)):
        found = inspect.signature(reward).parameters
        assert DEFAULTS[name] == (found["mode"].default, found["side"].default)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_is_as_large_as_planned(recipe, tmp_path, method):
    settings = recipe("builtin", *PLAIN, f"model.method={method}", "model.lora_rank=64")
    real = Real(settings)
    checkpoint.save(tmp_path / "iteration-000001", real.weights, real.optimizer, {}, keep=1)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert Planner(settings).sizes["checkpoint"] == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize("every, best", [(20, 1), (0, None)])
def test_disk_is_for_the_most_checkpoints_at_a_time(recipe, tmp_path, monkeypatch, every, best):
    settings = recipe("builtin", *PLAIN, "checkpoint.keep=2", f"evaluate.every={every}")
    real, there, seal = Real(settings), [], checkpoint.durable.seal

    def sealed(folder):
        there.append(len(list(tmp_path.iterdir())))
        seal(folder)

    monkeypatch.setattr(checkpoint.durable, "seal", sealed)
    for iteration in range(1, 6):
        folder = tmp_path / f"iteration-{iteration:06d}"
        checkpoint.save(folder, real.weights, real.optimizer, {}, keep=2, best=best)
    found = cost(settings, Planner(settings).plan())
    assert found.disk["checkpoints"] == max(there) * found.plan.sizes["checkpoint"]
    short = recipe("builtin", *PLAIN, "checkpoint.keep=2", "train.iterations=2")
    assert cost(short, found.plan).checkpoints == 2


def test_commands(inside, tmp_path):
    small = ("--set", "rollout.samples_per_prompt=4", "--set", "rollout.prompts_per_iteration=2")
    narrow = (*small, "--set", "train.precision=bf16", "--efficiency", "0.5")
    code, out, _ = inside(
        "plan", "builtin-lora", *narrow, "--gpu", "RTX 4090", "--json", tmp_path / "plan.json"
    )
    out = " ".join(out.split())
    assert code == 0 and "an iteration on rtx-4090 (165.2 TFLOP/s in bfloat16)" in out
    assert "at 50% of the peak, an assumption" in out and "first checkpoint after about" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["card"]["name"] == "rtx-4090" and written["gpu_bytes"] == 24 << 30
    flops = sum(written["flops_per_iteration"].values())
    assert written["seconds_per_iteration"]["bound"] == pytest.approx(flops / 165.2e12)
    assert written["seconds_per_iteration"]["estimate"] == pytest.approx(2 * flops / 165.2e12)
    assert written["disk_bytes"]["checkpoints"] > 0 and written["hours"]["estimate"] > 0

    code, out, _ = inside("plan", "builtin-lora", *small, "--gpu", "12GB")
    assert code == 0 and "like --gpu rtx-3060 or --gpu rtx-4070" in " ".join(out.split())
    assert " hours" not in out and "first checkpoint" not in out
    code, _, err = inside("plan", "--gpu", "rtx-409")
    assert code == 2 and "did you mean 'rtx-4090'" in err
    code, _, err = inside("plan", "--efficiency", "0.5")
    assert code == 2 and "goes with the name of a card" in err
    for option, value in [
        ("--efficiency", "1.5"),
        ("--efficiency", "nan"),
        ("--hours", "0"),
        ("--hours", "-1"),
    ]:
        code, out, err = inside("plan", "--gpu", "rtx-4090", option, value)
        assert (code, out) == (2, "") and f"{option}: expected " in err and f"got {value}" in err
