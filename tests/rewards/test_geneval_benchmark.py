"""`crd-fast eval --benchmark geneval`: which detector, which prompts, and the table."""

import json

import pytest

import crd_fast.cli
from crd_fast.config import build_recipe, load_recipe
from crd_fast.rewards.geneval_benchmark import geneval_recipe, geneval_table
from crd_fast.train.inference import Source, asked


def recipe(path, rewards, eval_rewards=None):
    values = {"model": {"path": path}, "rewards": rewards, "evaluate": {"prompts": "mine.jsonl", "steps": 7}}
    return values | {"eval_rewards": eval_rewards or {}}


@pytest.mark.parametrize(
    "path, rewards, judges, expected, prompts",
    [
        ("builtin", {"geneval": 1.0}, {}, {"geneval": {"weight": 1.0}}, "builtin-heldout"),
        ("builtin", {"mine:reward": 1.0}, {}, {"geneval": {"weight": 1.0}}, "builtin-heldout"),
        ("sd3", {"ocr": 1.0}, {}, {"geneval_mask2former": {"weight": 1.0, "batch": 2}}, "geneval-heldout"),
        (
            "sd3",
            {"ocr": 1.0},
            {"geneval_mask2former": {"path": "/models/m2f", "weight": 0.1}},
            {"geneval_mask2former": {"path": "/models/m2f", "weight": 1.0, "batch": 2}},
            "geneval-heldout",
        ),
        (  # a judge of this name reads the built-in world alone, and a reward cannot be optional
            "sd3",
            {"geneval": 1.0},
            {"geneval_mask2former": {"path": "/models/m2f", "optional": True}},
            {"geneval_mask2former": {"path": "/models/m2f", "weight": 1.0, "batch": 2}},
            "geneval-heldout",
        ),
    ],
)
def test_the_recipes_own_detector_comes_first(path, rewards, judges, expected, prompts):
    settings = {"batch": 2} if "sd3" in path else None
    values = geneval_recipe(recipe(path, rewards, judges), settings)
    assert values["rewards"] == expected and values["eval_rewards"] == {}
    assert values["evaluate"] == {"prompts": prompts, "steps": 7}


def test_what_comes_out_is_a_recipe():
    values = geneval_recipe(load_recipe("builtin").model_dump())
    assert build_recipe(values).evaluate.prompts == "builtin-heldout"


def test_a_file_is_asked_for_whole():
    """The limit of a recipe is for its own prompts: of a file by categories it would leave the first ones."""
    source = Source(load_recipe("builtin", ["evaluate.max_prompts=4"]))
    limits = {
        prompts: asked(source, prompts=prompts).recipe.evaluate.max_prompts
        for prompts in (None, "builtin-heldout", "mine.jsonl")
    }
    assert limits == {None: 4, "builtin-heldout": 4, "mine.jsonl": None}


def test_a_model_without_a_recipe_has_the_benchmarks_reward():
    source = Source(build_recipe({"model": {"path": "foo/bar"}}), own=False)
    found = asked(source, geneval_recipe, prompts="mine.jsonl").recipe
    assert list(found.rewards) == ["geneval_mask2former"] and found.evaluate.prompts.endswith("mine.jsonl")


def test_the_table_has_the_papers_columns():
    metrics = {"eval/images": 8, "eval/overall": 0.5, "eval/counting": 0.25, "eval/color_attr": 0.751}
    table = geneval_table("run", metrics)
    titles = [column.header for column in table.columns]
    assert titles == [
        "Overall",
        "Single object",
        "Two object",
        "Counting",
        "Colors",
        "Position",
        "Color attribution",
    ]
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["0.50", "-", "-", "0.25", "-", "-", "0.75"]


def test_the_command(inside, monkeypatch, tmp_path):
    monkeypatch.setattr(crd_fast.cli.console, "_width", 200)
    path = tmp_path / "evaluation_metadata.jsonl"
    entry = {
        "tag": "colors",
        "include": [{"class": "circle", "count": 1, "color": "red"}],
        "prompt": "a red circle",
    }
    path.write_text(json.dumps(entry) + "\n")
    code, out, _ = inside(
        "eval", "builtin", "--benchmark", "geneval", "--prompts", str(path), "--samples", "2", "--steps", "2"
    )
    assert code == 0 and "GenEval of builtin: 2 images" in out
    rows = [line for line in out.splitlines() if "Color attribution" in line]
    assert len(rows) == 1 and rows[0].index("Overall") < rows[0].index("Single object") < rows[0].index(
        "Colors"
    )
    code, _, err = inside("eval", "builtin", "--benchmark", "genevil")
    assert code == 2 and "expected geneval, got 'genevil'" in err
    code, _, err = inside("eval", "builtin", "--set", "path=here")
    assert code == 2 and "--benchmark" in err
