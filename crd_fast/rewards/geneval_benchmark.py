"""Benchmarks of a checkpoint, with the table that papers print."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from crd_fast.config import WORLD_REWARDS

GENEVAL = "geneval"
GENEVAL_REWARDS = ("geneval", "geneval_correct", "geneval_strict", "geneval_mask2former")
GENEVAL_COLUMNS = {  # in the order of GenEval's own table (arXiv 2310.11513)
    "overall": "Overall",
    "single_object": "Single object",
    "two_object": "Two object",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Color attribution",
}


def geneval_recipe(values: dict, settings: dict | None = None) -> dict:
    """A recipe's values with GenEval as the only reward, and held-out prompts of its categories.

    The detector is the one that the recipe has among its rewards, else the built-in world's for the built-in
    model and Mask2Former for others. settings: of the detector, on top of the recipe's.
    """
    builtin = values["model"]["path"] == "builtin"
    rewards = {**values.get("eval_rewards", {}), **values["rewards"]}
    usable = [name for name in GENEVAL_REWARDS if builtin or name not in WORLD_REWARDS]
    name = next((name for name in rewards if name in usable), None)
    name = name or ("geneval" if builtin else "geneval_mask2former")
    known = rewards.get(name)
    known = known if isinstance(known, dict) else {}
    known = {key: value for key, value in known.items() if key != "optional"}  # of a judge alone
    prompts = "builtin-heldout" if builtin else "geneval-heldout"
    return values | {
        "rewards": {name: {**known, **(settings or {}), "weight": 1.0}},
        "eval_rewards": {},
        "evaluate": values["evaluate"] | {"prompts": prompts},
    }


def geneval_table(source: str, metrics: dict[str, float]) -> Table:
    """One row: overall, the mean of the categories, and the six; a dash where no prompt asked for one."""
    table = Table(title=Text(f"GenEval of {source}: {metrics['eval/images']} images"))
    row = []
    for name, title in GENEVAL_COLUMNS.items():
        table.add_column(title, justify="right")
        row.append(f"{metrics[f'eval/{name}']:.2f}" if f"eval/{name}" in metrics else "-")
    table.add_row(*row)
    return table
