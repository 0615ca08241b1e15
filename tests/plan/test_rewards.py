"""Networks of rewards and judges in the plan."""

import pytest
from transformers import CLIPConfig

from crd_fast.plan.cost import cost, reward_seconds
from crd_fast.plan.planner import Planner
from crd_fast.plan.rewards import NETWORKS, clip_network, reward_bytes
from crd_fast.train.features import AT_ONCE
from tools.reward_sizes import CLIPS, MODELS, measure

PICKSCORE = 4 * 986_109_441  # bytes; ViT-H/14 in float32


@pytest.mark.parametrize("name", [name for name, (_, fake, _) in MODELS.items() if fake])
def test_sizes_are_the_models(name):
    assert NETWORKS[name] == measure(name)


def test_every_network_is_known():
    assert NETWORKS.keys() == MODELS.keys()


def test_rewards_are_there_throughout_and_judges_at_evaluations(recipe):
    plain = Planner(recipe("builtin")).plan()
    both = ("rewards={geneval: 1.0, pickscore: 1.0}", "eval_rewards={clipscore: {batch: 8}}")
    planned = Planner(recipe("builtin", *both)).plan()
    added = {
        name: peak.bytes - plain.phases[name].bytes
        for name, peak in planned.phases.items()
        if name != "judge"
    }
    batch = 32 * NETWORKS["pickscore"].workspace
    beside_the_rollout = {"rollout": PICKSCORE + batch, "decode": PICKSCORE + batch}
    assert added == dict.fromkeys(plain.phases, PICKSCORE) | {
        name: size for name, size in beside_the_rollout.items() if name in added
    }
    clipscore = NETWORKS["clipscore"]
    judging = PICKSCORE + max(batch, 4 * clipscore.parameters + 8 * clipscore.workspace)
    assert planned.phases["judge"].bytes == plain.phases["checkpoint"].bytes + judging
    for peak in planned.phases.values():
        assert sum(peak.parts.values()) == peak.bytes
    assert "judge" not in Planner(recipe("builtin", *both, "evaluate.every=0")).plan().phases


def test_the_network_of_the_features_is_there_at_evaluations(recipe, tmp_path):
    """Of a CLIP model whose config is here; until then it waits on the host, as judges do."""
    vision, text, width = CLIPS["ViT-B/32"]
    CLIPConfig(vision_config=vision, text_config=text, projection_dim=width).save_pretrained(tmp_path)
    features = ("evaluate.drift=4.5", f"evaluate.features={tmp_path}")
    both = recipe("builtin", "rewards={geneval: 1.0, pickscore: 1.0}", *features)
    plan, clip = Planner(both).plan(), NETWORKS["clipscore"]
    at_rest = plan.phases["checkpoint"].bytes  # pickscore among it
    assert plan.phases["judge"].bytes == at_rest + 4 * clip.parameters + AT_ONCE * clip.workspace
    alone = Planner(recipe("builtin", *features)).plan()
    assert alone.phases["judge"].parts["rewards"] == 4 * clip.parameters + AT_ONCE * clip.workspace
    judged = recipe("builtin", "eval_rewards={clipscore: 1.0}", *features)
    judging = Planner(judged).plan().phases["judge"]
    assert judging.bytes == alone.phases["judge"].bytes  # one after the other
    plain = cost(recipe("builtin"), alone).host_bytes(False)
    assert cost(both, alone).host_bytes(False) == plain + 4 * clip.parameters
    assert cost(judged, alone).host_bytes(False) == plain + 8 * clip.parameters
    for more in (("evaluate.features=random",), ("evaluate.every=0",)):
        other = recipe("builtin", *features, *more)
        assert "judge" not in Planner(other).plan().phases
        assert cost(other, alone).host_bytes(False) == plain


def test_of_a_model_that_is_not_here_the_largest_is_expected():
    assert clip_network("nobody/nothing") == NETWORKS["pickscore"]


@pytest.mark.parametrize(
    "change, said",
    [
        ("rewards={pickscor: 1.0}", "unknown reward 'pickscor', did you mean 'pickscore'"),
        ("rewards.ocr.workers=0", "reward ocr: workers: expected auto or a whole number >= 1, got 0"),
        ("eval_rewards.pickscore.workers=-3", "reward pickscore: workers: expected auto"),
        ("rewards.ocr.timeout=never", "reward ocr: timeout: expected a number of seconds"),
    ],
)
def test_what_training_refuses_is_not_planned(inside, change, said):
    code, _, err = inside("plan", "builtin-ocr", "--gpu", "rtx-4090", "--set", change)
    assert code == 2 and said in err and "Traceback" not in err


def test_a_judge_of_the_same_name_hides_no_mistake(inside):
    both = ("--set", "rewards={ocr: {workers: 0}}", "--set", "eval_rewards={ocr: 1.0}")
    code, _, err = inside("plan", "builtin-ocr", *both)
    assert code == 2 and "reward ocr: workers: expected auto" in err


def test_settings_that_only_a_reward_can_judge_stop_no_plan(recipe):
    odd = recipe("builtin", "rewards={pickscore: {batch: x}, ocr: {mode: [1]}}")
    assert reward_bytes(odd.rewards) == reward_bytes({"pickscore": 1.0})
    assert reward_seconds("ocr", odd.rewards["ocr"]) == 0


def test_each_worker_has_a_copy(recipe):
    weights = {}
    for workers in (1, 3):
        plan = Planner(recipe("builtin", f"rewards={{pickscore: {{workers: {workers}}}}}")).plan()
        weights[workers] = plan.phases["checkpoint"].parts["rewards"]
    assert weights == {1: PICKSCORE, 3: 3 * PICKSCORE}
