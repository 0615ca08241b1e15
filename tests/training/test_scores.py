"""Scores of single pictures, and what two evaluations differ by: against scipy in float64."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from crd_fast.errors import UserError
from crd_fast.run.scores import (
    Scores,
    compare,
    gap,
    mean_and_error,
    read_scores,
    scores_path,
    write_scores,
)


def scores(values, each=1, categories=None, trained=None):
    """values: by name, (N,); `each` pictures a prompt."""
    count = len(next(iter(values.values())))
    return Scores(
        index=[i // each for i in range(count)],
        prompts=[f"a photo of {i // each} things" for i in range(count)],
        seeds=[7 * i + 1 for i in range(count)],
        categories=categories or [""] * count,
        trained=trained or [False] * count,
        values={name: np.asarray(value, dtype=np.float64) for name, value in values.items()},
    )


def drawn(seed, count, gain=0.1, share=0.5):
    """Two evaluations whose pictures are alike: the first is most of the second."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=count)
    return before, before + gain + share * rng.normal(size=count)


@pytest.mark.parametrize("count", [2, 3, 50, 384])
@pytest.mark.parametrize("gain", [0.0, 0.1, 2.0])
def test_one_picture_a_prompt_is_the_paired_t_test(count, gain):
    before, after = drawn(count, count, gain)
    found = compare(scores({"reward": before}), scores({"reward": after}), "reward")
    expected = stats.ttest_rel(after, before)
    assert found.difference == pytest.approx((after - before).mean(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(after - before), rel=1e-12)
    assert found.difference / found.error == pytest.approx(expected.statistic, rel=1e-10)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.significant == (expected.pvalue < 0.05)
    assert (found.prompts, found.pictures) == (count, count)
    assert (found.before, found.after) == (pytest.approx(before.mean()), pytest.approx(after.mean()))


@pytest.mark.parametrize("each", [2, 5])
def test_pictures_of_one_prompt_are_one_unit(each):
    before, after = drawn(each, 40 * each)
    after += np.repeat(np.random.default_rng(9).normal(size=40), each)  # what its pictures have in common
    found = compare(scores({"reward": before}, each), scores({"reward": after}, each), "reward")
    expected = stats.ttest_rel(*(v.reshape(40, each).mean(axis=1) for v in (after, before)))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.difference / found.error == pytest.approx(expected.statistic, rel=1e-10)
    assert (found.prompts, found.pictures) == (40, 40 * each)
    assert found.error > 1.2 * stats.sem(after - before)  # of pictures as if they were independent


def test_a_prompt_that_stands_twice_is_one_unit():
    before, after = drawn(1, 6)
    one = scores({"reward": before})
    one = dataclasses.replace(one, prompts=["a", "b", "a", "c", "b", "d"])
    found = compare(one, dataclasses.replace(one, values={"reward": after}), "reward")
    difference = after - before
    mean = difference.mean()
    sums = [difference[[0, 2]].sum() - 2 * mean, difference[[1, 4]].sum() - 2 * mean]
    sums += [difference[3] - mean, difference[5] - mean]
    assert found.prompts == 4
    assert found.error == pytest.approx(math.sqrt(4 / 3 * sum(s * s for s in sums)) / 6, rel=1e-12)


def test_means_of_categories_weigh_categories_alike():
    categories = ["counting"] * 4 + ["colors"] * 12
    before, after = drawn(3, 16)
    values = {"overall": before, "reward": before}, {"overall": after, "reward": after}
    one, two = (scores(v, categories=categories) for v in values)
    found = compare(one, two, "overall")
    assert found.after == pytest.approx((after[:4].mean() + after[4:].mean()) / 2, rel=1e-12)
    assert found.before == pytest.approx((before[:4].mean() + before[4:].mean()) / 2, rel=1e-12)
    assert compare(one, two, "reward").after == pytest.approx(after.mean(), rel=1e-12)
    counting = compare(one, two, "overall", "counting")
    assert counting.p == pytest.approx(stats.ttest_rel(after[:4], before[:4]).pvalue, rel=1e-9)
    assert (counting.pictures, counting.before) == (4, pytest.approx(before[:4].mean()))
    # as many of each: the plain paired test
    even = [scores(v, categories=["counting"] * 8 + ["colors"] * 8) for v in values]
    assert compare(*even, "overall").p == pytest.approx(stats.ttest_rel(after, before).pvalue, rel=1e-9)
    with pytest.raises(UserError, match="position: expected a category"):
        compare(one, two, "overall", "position")


def test_pairs_are_found_by_prompt_and_seed_not_by_place():
    before, after = drawn(4, 20)
    one, two = scores({"reward": before}), scores({"reward": after})
    order = np.random.default_rng(0).permutation(20)
    mixed = Scores(*([list(np.array(column, dtype=object)[order]) for column in
                      (two.index, two.prompts, two.seeds, two.categories, two.trained)]),
                   {"reward": after[order]})  # fmt: skip
    assert compare(one, mixed, "reward") == compare(one, two, "reward")


def test_what_cannot_be_paired_is_refused():
    one = scores({"reward": [0.0, 1.0, 2.0]})
    other = dataclasses.replace(one, seeds=[1, 8, 99])
    with pytest.raises(
        UserError, match="same prompts and seeds to pair, got 3 and 3 pictures with 2 in common"
    ):
        compare(one, other, "reward")
    with pytest.raises(UserError, match="3 and 2 pictures with 2"):
        compare(one, scores({"reward": [0.0, 1.0]}), "reward")
    with pytest.raises(UserError, match="clean: expected a measure of both"):
        compare(one, one, "clean")


def test_no_difference_one_prompt_and_a_constant_difference():
    values = np.array([0.0, 1.0, 1.0])
    same = compare(scores({"reward": values}), scores({"reward": values}), "reward")
    assert (same.difference, same.error, same.p, same.significant) == (0, 0, 1, False)
    all_alike = compare(scores({"reward": values}), scores({"reward": values + 0.5}), "reward")
    assert all_alike.significant and all_alike.p == 0
    alone = compare(scores({"reward": [0.0]}), scores({"reward": [1.0]}), "reward")
    assert math.isnan(alone.error) and math.isnan(alone.p) and not alone.significant


def test_a_mean_between_0_and_1_is_no_coin():
    """Scores near 1 that all rise a little: the error is that of the differences, and it is small."""
    before = 0.9 + 0.001 * np.sin(np.arange(96))
    after = before + 0.004 + 0.0005 * np.cos(np.arange(96))
    found = compare(scores({"reward": before}), scores({"reward": after}), "reward")
    assert found.error < 1e-4 and found.significant
    assert math.sqrt(2 * 0.9 * 0.1 / 96) > 0.04  # what the formula for shares would say


def test_the_gap_of_two_measures_is_paired_too():
    reward, judge = drawn(6, 60, gain=1.0), drawn(7, 60, gain=-0.3)
    one, two = (scores({"reward": r, "judge/a": 40 * j, "flat": 0 * r + 1}) for r, j in zip(reward, judge))
    found = gap(one, two, "reward", "judge/a")
    rise = [(after - before) / before.std() for before, after in (reward, judge)]
    expected = stats.ttest_rel(*rise)
    assert found.difference == pytest.approx((rise[0] - rise[1]).mean(), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert gap(one, two, "reward", "flat") is None
    assert gap(one, two, "flat", "reward") is None


def test_weights_of_any_kind():
    """A weighted mean's error, as a sum over units, by hand in float64."""
    values, units = np.array([1.0, 2.0, 4.0, 8.0]), np.array([5, 5, 2, 9])
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    mean, error, count = mean_and_error(values, units, weights)
    assert (mean, count) == (pytest.approx(4.9), 3)
    sums = [0.1 * (1 - 4.9) + 0.2 * (2 - 4.9), 0.3 * (4 - 4.9), 0.4 * (8 - 4.9)]
    assert error == pytest.approx(math.sqrt(1.5 * sum(s * s for s in sums)), rel=1e-12)


def test_a_file_holds_everything(tmp_path):
    path = scores_path(tmp_path, 20)
    assert path == tmp_path / "evaluations" / "000020.jsonl"
    written = scores({"reward": [0.1, 1 / 3], "judge/a": [2e-9, -7.0]}, categories=["é", ""])
    written = dataclasses.replace(
        written, prompts=["a\u2028line \"sépare\"\n", "b"], seeds=[2**62 + 1, 3], trained=[True, None]
    )  # fmt: skip
    write_scores(path, written)
    found = read_scores(path)
    assert found.values.keys() == written.values.keys()
    assert all(np.array_equal(found.values[name], written.values[name]) for name in written.values)
    for field in ("index", "prompts", "seeds", "categories", "trained"):
        assert list(getattr(found, field)) == list(getattr(written, field)), field
    write_scores(path, scores({"reward": [5.0]}))
    assert read_scores(path).values["reward"].tolist() == [5.0]
    assert [file.name for file in path.parent.iterdir()] == ["000020.jsonl"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[1]\n" + text,
        lambda text: text.replace('"seed"', '"sed"'),
        lambda text: text.replace('"reward"', '"rewart"', 1),
        lambda text: "null\n",
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = scores_path(tmp_path, 0)
    write_scores(path, scores({"reward": [0.0, 1.0]}))
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"000000\.jsonl: not the scores of an evaluation"):
        read_scores(path)


def test_how_many_prompts_are_trained_on():
    values = {"reward": np.zeros(6)}
    for trained, expected in [
        ([False] * 6, (0, 3)),
        ([True, True, False, False, True, True], (2, 3)),
        ([None] * 6, None),
    ]:
        assert scores(values, each=2, trained=trained).trained_on() == expected
