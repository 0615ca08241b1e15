"""Networks of rewards and judges in the plan."""

import pytest

from crd_fast.plan.planner import Planner
from crd_fast.plan.rewards import NETWORKS
from tools.reward_sizes import MODELS, measure

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


def test_each_worker_has_a_copy(recipe):
    weights = {}
    for workers in (1, 3):
        plan = Planner(recipe("builtin", f"rewards={{pickscore: {{workers: {workers}}}}}")).plan()
        weights[workers] = plan.phases["checkpoint"].parts["rewards"]
    assert weights == {1: PICKSCORE, 3: 3 * PICKSCORE}
