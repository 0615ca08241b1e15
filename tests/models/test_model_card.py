"""What a model card says is of the checkpoint that it goes with, and of nobody's machine."""

import json
from types import SimpleNamespace

import yaml

from crd_fast.config import build_recipe
from crd_fast.run.report.run import Run
from crd_fast.train import model_card


def test_a_card_of_an_earlier_checkpoint_has_no_later_warning(tmp_path):
    for name, text in {
        "config.yaml": "{}",
        "metrics.jsonl": '{"iteration": 10}\n{"iteration": 20}\n',
        "warnings.txt": "iteration 10: early\niteration 20: late\nfrom the start\n",
    }.items():
        (tmp_path / name).write_text(text)
    run = model_card.run_until(SimpleNamespace(run=tmp_path, iteration=10))
    assert run.warned == ["iteration 10: early", "from the start"] and len(run.metrics) == 1


def test_pictures_on_a_card_are_of_evaluations_alike(tmp_path):
    """A run that was gone on with other prompts to be evaluated by: what was before is not to be compared."""
    (tmp_path / "samples").mkdir()
    rows = [{"iteration": i, "eval/overall": 0.5, "evaluated_alike_since": 10 * (i > 0)} for i in (0, 10, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "config.yaml").write_text("{}")
    for i in (0, 10, 20):
        (tmp_path / "samples" / f"{i:06d}.png").write_text(str(i))
    trained = SimpleNamespace(run=tmp_path, iteration=20)
    run = model_card.run_until(trained)
    assert model_card.copy_grids(run, 20, tmp_path) == [("before.png", 10), ("after.png", 20)]


def test_the_roles_on_a_card(tmp_path):
    """Names may have slashes, as addresses and files have, and a reward of weight 0 is not trained on."""
    names = ["reward/http://127.0.0.1:8701", "reward/ink", "judge//home/me/my.py:f", "reward_mean", "clean"]
    run = Run(tmp_path, config={"rewards": {"http://127.0.0.1:8701": {"weight": 1.0}, "ink": 0.0}})
    run.metrics = [{"iteration": i, **{f"eval/{name}": 0.1 * i for name in names}} for i in (0, 10)]
    roles = {row["name"]: row["role"] for row in model_card.rows(run)}
    assert list(roles.values()) == ["trained on", "trained on", "weight 0", "judge", "reported"]


def test_a_model_card_says_no_folder_of_several_prompt_files():
    prompts = {"/home/me/a/mine.txt": 3, "/home/me/b/mine.txt": 1, "geneval": 2}
    recipe = build_recipe({"rollout": {"prompts": prompts}, "evaluate": {"prompts": "/home/me/c.txt"}})
    said = model_card.settings(SimpleNamespace(recipe=recipe))
    assert "/home" not in said
    assert yaml.safe_load(said)["rollout"]["prompts"] == {"mine.txt": 4, "geneval": 2}
