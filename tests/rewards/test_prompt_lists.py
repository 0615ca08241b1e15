"""Several prompt files by weight, and what is held out of them for evaluations."""

import itertools
import logging

import pytest

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.prompts.lists import PromptLists, evaluated_lists, evaluation_prompts, notes, training_prompts
from crd_fast.prompts.source import PromptSource
from crd_fast.ranks import Ranks
from crd_fast.run.observer import NOBODY
from crd_fast.train.iteration_prompts import IterationPrompts


@pytest.fixture
def written(tmp_path):
    """A file of prompts `NAME 0`, `NAME 1`, ..., in a folder of the test."""

    def write(name, count, more=()):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join([*(f"{name} {i}" for i in range(count)), *more]), encoding="utf-8")
        return str(path)

    return write


def texts(entries):
    return [entry["prompt"] for entry in entries]


def first_words(entries):
    return [text.split()[0] for text in texts(entries)]


def own(prompts, *overrides):
    """A recipe of a model that does not ship."""
    values = {
        "model": {"path": "org/name"},
        "rollout": {"prompts": prompts},
        "rewards": {"colorfulness": 1.0},
    }
    return build_recipe(values, overrides)


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (0.7, 0.2, 0.1), (1e-3, 5)])
@pytest.mark.parametrize("count", [1, 7, 48])
def test_every_iteration_has_each_files_share(written, weights, count):
    names = ["a", "b", "c"][: len(weights)]
    lists = PromptLists({written(name, 1000): weight for name, weight in zip(names, weights)})
    drawn = []
    for iteration in range(12):
        now = first_words(lists.draw(count, seed=1, iteration=iteration))
        drawn += now
        for so_far in (now, drawn):
            for name, weight in zip(names, weights):
                assert abs(so_far.count(name) - len(so_far) * weight / sum(weights)) <= 1.5


def test_an_iteration_is_drawn_alike_whatever_came_before(written):
    given = {written("a", 10): 3, written("b", 7): 2}
    one = PromptLists(given)
    drawn = [one.draw(5, 0, iteration) for iteration in range(20)]
    assert [PromptLists(given).draw(5, 0, iteration) for iteration in reversed(range(20))] == drawn[::-1]
    assert [PromptLists(given).draw(5, 1, iteration) for iteration in range(20)] != drawn
    # 100 positions: 60 of the first, six epochs of its ten, 40 of the other, five of its seven and five more
    of_a = [text for text in itertools.chain(*map(texts, drawn)) if text.startswith("a")]
    assert len(of_a) == 60 and all(sorted(of_a[i : i + 10]) == sorted(set(of_a)) for i in range(0, 60, 10))
    assert of_a[:10] != of_a[10:20]


def test_the_files_take_turns_within_an_iteration(written):
    drawn = first_words(PromptLists({written("a", 99): 1, written("b", 99): 1}).draw(8, 0, 3))
    assert all({one, other} == {"a", "b"} for one, other in itertools.pairwise(drawn))


@pytest.mark.parametrize(
    "prompts, words",
    [
        ("{}", "rollout.prompts: expected at least one file or list"),
        ("{a.txt: 0}", "rollout.prompts: a.txt: expected a weight above 0, got 0"),
        ("{a.txt: .nan}", "a.txt: expected a weight above 0, got nan"),
        ("{a.txt: much}", "a.txt: expected a weight, got 'much'"),
        ("[a.txt, b.txt]", "expected a file, a list or a mapping of them to weights"),
    ],
)
def test_weights_that_are_none(prompts, words):
    with pytest.raises(UserError) as error:
        own("a.txt", f"rollout.prompts={prompts}")
    assert words in str(error.value)


# --- held out


def test_a_tenth_is_held_out_and_never_trained_on(written):
    recipe = own({written("a", 150, ["B 3"]): 3, written("b", 50, ["b  7"]): 1})
    held_out = texts(evaluation_prompts(recipe))
    assert len(held_out) == 20 == len(set(held_out))
    trained = training_prompts(recipe)
    assert len(trained.entries()) == 202 - 20 - sum(text in ("b 3", "B 3", "b 7") for text in held_out)
    for iteration in range(40):
        assert not set(held_out) & set(texts(trained.draw(8, 0, iteration)))


def test_what_is_held_out_depends_on_the_prompts_alone(written, tmp_path):
    path = written("a", 200)
    expected = texts(evaluation_prompts(own(path)))
    (tmp_path / "other.txt").write_text("\n".join(f"A  {i}" for i in reversed(range(200))))
    other = own(str(tmp_path / "other.txt"), "train.seed=9")
    assert [" ".join(text.lower().split()) for text in texts(evaluation_prompts(other))] == expected
    few = own(path, "evaluate.max_prompts=3")
    assert texts(evaluation_prompts(few)) == expected[:3]
    assert texts(training_prompts(few).entries()) == texts(training_prompts(own(path)).entries())
    assert len(evaluation_prompts(own(written("b", 5000)))) == 384
    assert expected != [f"a {i}" for i in range(20)]


def test_too_few_prompts(written):
    recipe = own(written("a", 79, ["a 0", "A 1"]))
    for ask in (evaluation_prompts, training_prompts):
        with pytest.raises(UserError) as error:
            ask(recipe)
        assert "79 different prompts" in str(error.value) and "set evaluate.every: 0" in str(error.value)
    assert len(training_prompts(own(written("b", 5), "evaluate.every=0")).entries()) == 5
    with pytest.raises(UserError, match=r"evaluate\.prompts: expected a file"):
        evaluation_prompts(own(written("b", 500), "evaluate.every=0"))
    assert len(evaluation_prompts(own(written("c", 80)))) == 8


def test_lists_that_ship_have_held_out_parts_of_their_own(written):
    assert evaluation_prompts(own("geneval")) == PromptSource("geneval-heldout").all(None)
    lists = {"ocr-words": 1, written("a", 100): 1}
    both = evaluation_prompts(own(lists, "evaluate.max_prompts=40"))
    assert evaluated_lists(own(lists)) == ["ocr-words-heldout", written("a", 100)]
    words = [entry for entry in both if not entry["prompt"].startswith("a ")]
    assert len(both) <= 40 and len(words) < len(both)
    assert all(entry in PromptSource("ocr-words-heldout").entries() for entry in words)
    builtin = build_recipe({"rollout": {"prompts": written("a", 3)}})
    assert evaluation_prompts(builtin) == PromptSource("builtin-heldout").all(None)
    assert evaluated_lists(builtin) == ["builtin-heldout"]
    signs = build_recipe({"model": {"path": "builtin-ocr"}})
    assert evaluation_prompts(signs) == PromptSource("builtin-ocr-heldout").all(None)


@pytest.mark.parametrize("prompts", ["geneval-heldout", {"geneval-heldout": 1, "ocr-words-heldout": 2}])
def test_training_on_held_out_parts_alone_leaves_nothing_to_evaluate(prompts):
    recipe = own(prompts)
    with pytest.raises(UserError, match=r"evaluate\.prompts: expected a file or a list: .* geneval-heldout"):
        evaluation_prompts(recipe)
    assert evaluation_prompts(own(prompts, "evaluate.prompts=geneval"))


@pytest.mark.parametrize("name", ["ocr-words", "geneval"])
def test_what_is_held_out_of_a_file_is_not_trained_on_from_a_list_that_ships(written, name):
    mine = written("mine", 20, texts(PromptSource(name).entries())[:100])
    recipe = own({name: 1, mine: 1})
    evaluated = set(texts(evaluation_prompts(recipe)))
    shared = evaluated & set(texts(PromptSource(name).entries()))
    assert len(shared) > 5  # which the file has too
    lists = training_prompts(recipe)
    assert not evaluated & set(texts(lists.entries()))
    assert not evaluated & set(texts(lists.draw(400, seed=0, iteration=0)))
    assert len(list(notes(recipe))) == 1


def test_held_out_parts_of_lists_that_ship_are_found_in_files(written):
    mine = written("mine", 100, texts(PromptSource("ocr-words-heldout").entries())[:20])
    (said,) = [note for note in notes(own({"ocr-words": 1, mine: 1})) if note.startswith("warning")]
    assert "stand in rollout.prompts too" in said


def test_what_is_held_out_and_what_stands_twice_is_said_once(written, caplog):
    one, other = written("a", 100, ["a 5", "A  5", "a 6"]), written("b", 100, ["a 7"])
    with caplog.at_level(logging.WARNING, "crd_fast"):
        IterationPrompts(own({one: 1, other: 1}), Ranks(), NOBODY)
    assert [record.getMessage() for record in caplog.records] == [
        "held out: 20 of 200 prompts are never trained on and are what is evaluated "
        "(evaluate.prompts names others)",
        f"warning: {one}: duplicates of 2 of its 100 different prompts, 103 in all: 'a 5'",
        f"warning: 1 prompt stands in {other} and in {one}: 'a 7'",
    ]
    assert list(notes(own(one, f"evaluate.prompts={other}")))[1:] == [
        "warning: of 101 evaluated prompts 1 stand in rollout.prompts too: 'a 7'"
    ]
    assert not list(notes(own("geneval"))) and not list(notes(own(other, "evaluate.every=0")))


def test_prompts_of_lists_that_ship_that_are_trained_on_and_evaluated_are_said(written):
    benchmark = written("benchmark", 5, texts(PromptSource("geneval").entries())[:3])
    (said,) = notes(own("geneval", f"evaluate.prompts={benchmark}"))
    assert said.startswith("warning: of 8 evaluated prompts 3 stand in rollout.prompts too: ")
    (said,) = notes(own({"geneval": 1, "geneval-heldout": 1}))
    assert said.startswith("warning: of 313 evaluated prompts 313 stand in rollout.prompts too: ")
    for world in ("builtin", "builtin-ocr"):
        assert not list(notes(build_recipe({"model": {"path": world}, "rollout": {"prompts": world}})))


@pytest.mark.parametrize("source", ["builtin", "geneval"])
def test_categories_can_be_left_out_of_training(source):
    left_out = ["counting", "position"]
    recipe = build_recipe(
        {
            "model": {"path": source if source == "builtin" else "org/name"},
            "rollout": {"prompts": source, "without_categories": left_out},
        }
    )
    lists = training_prompts(recipe)
    drawn = [entry["tag"] for iteration in range(3) for entry in lists.draw(8, 0, iteration)]
    others = ["single_object", "two_object", "colors", "color_attr"]
    assert [drawn.count(tag) for tag in others] == [6] * 4  # as many of each
    assert {entry["tag"] for entry in lists.entries()} == set(others)
    assert {entry["tag"] for entry in evaluation_prompts(recipe)} == {*others, *left_out}


def test_categories_of_a_file_can_be_left_out(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "one", "tag": "a"}\n{"prompt": "two", "tag": "b"}\n{"prompt": "three"}\n')

    def drawn(*left_out):
        lists = training_prompts(
            own(str(path), "evaluate.every=0", f"rollout.without_categories={[*left_out]}")
        )
        assert sorted(texts(lists.draw(3, 0, 0))) == sorted(
            texts(lists.entries()) * (3 // len(lists.entries()))
        )
        return texts(lists.entries())

    assert drawn() == ["one", "two", "three"] and drawn("a", "b") == ["three"]
    with pytest.raises(UserError, match=r"without_categories: expected categories .*\(a, b\), got 'c'"):
        drawn("c")
    evaluated = own(str(path), f"evaluate.prompts={path}", "rollout.without_categories=[a]")
    assert "of 3 evaluated prompts 2 stand in rollout.prompts too: 'two'" in "".join(notes(evaluated))
    path.write_text('{"prompt": "one", "tag": "a"}\n')
    with pytest.raises(UserError, match=r"expected some prompts of .* to be left, got none"):
        drawn("a")


def test_a_file_whose_prompts_are_all_held_out(written, tmp_path):
    path = written("a", 100)
    held_out = texts(evaluation_prompts(own(path)))
    rest = [text for text in texts(PromptSource(path).entries()) if text not in held_out[:1]]
    written("rest", 0, rest)
    lists = {str(tmp_path / "rest.txt"): 1, written("one", 0, held_out[:1]): 1}
    with pytest.raises(UserError, match=r"rollout\.prompts: expected some of .*one\.txt to be left"):
        training_prompts(own(lists))
