"""Files of prompts that were edited between the runs that read them."""

import json

from crd_fast.config import build_recipe
from crd_fast.prompts.source import PromptSource
from crd_fast.train.seen_prompts import SeenPrompts
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from tests.training.short_runs import recipe


def test_the_best_is_found_anew_where_the_file_of_prompts_was_edited(tmp_path, caplog):
    file, run = tmp_path / "held-out.jsonl", tmp_path / "run"
    entries = PromptSource("builtin-heldout").entries()

    def write(chosen):
        file.write_text("".join(json.dumps(entry) + "\n" for entry in chosen))

    evaluated = (f"evaluate.prompts={file}", "evaluate.every=1")
    write(entries[:4])
    assert Trainer(recipe(*evaluated, "train.iterations=1"), run).run()
    assert Trainer(recipe(*evaluated, "train.iterations=2"), run, resume=True).run()
    assert "found anew" not in caplog.text
    write(entries[1:5])
    assert Trainer(recipe(*evaluated, "train.iterations=3"), run, resume=True).run()
    assert "found anew" in caplog.text
    best = run / "checkpoints" / checkpoint.BEST
    assert best.resolve().name == "iteration-000003"


def test_prompts_that_were_trained_on_before_they_were_held_out_are_told(tmp_path):
    """A file to which prompts were added holds out others."""
    file = tmp_path / "prompts.txt"
    settings = build_recipe(
        {"model": {"path": "nowhere"}, "rollout": {"prompts": str(file)}, "rewards": {"clipscore": 1}}
    )

    def seen(count):
        file.write_text("".join(f"prompt {i}\n" for i in range(count)))
        return SeenPrompts.of(settings)

    before = SeenPrompts(**json.loads(json.dumps(seen(100).state)))
    assert not list(seen(100).changes(before))
    more = seen(140)
    trained, held_out = more.changes(before)
    new = len(set(more.held_out) - set(before.held_out))
    assert len(more.held_out) == 14 and new >= 4
    assert held_out.startswith(f"{new} of 14 held-out prompts are not those of before and may have been")
    assert trained.startswith("rollout.prompts: the prompts are not those of before")
