"""The grids of a report: what stands beside what, captions, and how large the page gets."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from PIL import Image

from crd_fast.run.report import write_report
from crd_fast.run.scores import guided_base_path, read_scores, scores_path, write_scores
from tests.cli.report_runs import Page, fake_run, guided_base, metrics, prompts, write_samples


def with_grids(folder, every=20, last=120, guided=True):
    """A run whose grids show the first prompts of its evaluations, as a run's own do."""
    rows, asked = metrics(last, every=every), prompts(24)
    if guided:
        rows[0] |= guided_base(folder)
    fake_run(folder, rows, asked, range(0, last + 1, every))
    for path in (folder / "evaluations").iterdir():
        scores = read_scores(path)
        write_scores(path, dataclasses.replace(scores, prompts=[*asked, *scores.prompts[24:]]))
    if guided:
        shutil.copy(folder / "samples" / f"{last:06d}.png", folder / "samples" / "guided_base.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_grids(tmp_path_factory.mktemp("runs") / "first run")


@pytest.fixture(scope="module")
def page(folder):
    return Page(write_report(folder))


def pictures(page):
    """Of the first prompt: what each picture is called."""
    first = page.images[0]["alt"].partition(": ")[2]
    return [image["alt"].partition(": ")[0] for image in page.images if image["alt"].endswith(f": {first}")]


def test_first_and_guided_base_stand_beside_every_evaluation(page):
    chosen = [f"Iteration {n}" for n in range(20, 121, 20)]
    assert pictures(page) == ["Iteration 0", "The base with guidance scale 4.5", *chosen]
    assert page.html.count('type="radio"') == 6 and page.html.count(" checked>") == 1
    assert 'id="grid-000120" checked' in page.html


def test_each_picture_has_its_prompt_and_what_it_got(folder, page):
    first, base, last = (
        read_scores(path).values["reward"]
        for path in (scores_path(folder, 0), guided_base_path(folder), scores_path(folder, 120))
    )
    assert abs(last[3] - first[3]) > 0.05  # told apart by two digits
    start = page.text.index("Samples before and after")
    shown = page.text[start:].split("a photo of")[3]  # what comes before the fourth caption
    for name, value in (("base", first[3]), ("guided base", base[3]), ("iteration 120", last[3])):
        assert f"{name} {value:.2f}".replace("-", "−") in shown
    assert f"iteration 20 {metrics(120)[20]['eval/reward_mean']:.3f}" in page.text


def test_rewards_of_other_pictures_are_not_shown(tmp_path, no_charts):
    """Where the grid's prompts are not the evaluation's, as in a folder that was put together by hand."""
    folder = with_grids(tmp_path)
    write_samples(tmp_path / "other", (0,), prompts(32)[8:])
    shutil.copy(tmp_path / "other" / "samples" / "prompts.json", folder / "samples" / "prompts.json")
    assert "what the rewards gave it" not in Page(write_report(folder)).text


def test_of_many_evaluations_some_can_be_chosen(tmp_path, no_charts):
    page = Page(write_report(with_grids(tmp_path, every=2, last=60)))
    chosen = pictures(page)[2:]
    assert chosen[-1] == "Iteration 60" and len(chosen) == 6 and "(6 of 30)" in page.text
    steps = [int(b.split()[1]) - int(a.split()[1]) for a, b in itertools.pairwise(chosen)]
    assert max(steps) - min(steps) <= 2


def test_two_evaluations_need_no_choice(tmp_path, no_charts):
    page = Page(write_report(with_grids(tmp_path, last=20, guided=False)))
    assert pictures(page) == ["Iteration 0", "Iteration 20"] and "radio" not in page.html


def test_pictures_that_are_of_no_evaluation_are_not_shown(tmp_path, no_charts):
    """Of one that was thrown away when the run went on from before it, and somebody's copy."""
    folder = with_grids(tmp_path, last=40, guided=False)
    for name in ("000030.png", "000040 copy.png"):
        shutil.copy(folder / "samples" / "000020.png", folder / "samples" / name)
    assert pictures(Page(write_report(folder))) == ["Iteration 0", "Iteration 20", "Iteration 40"]


def test_the_first_evaluation_alone(tmp_path, no_charts):
    page = Page(write_report(with_grids(tmp_path, last=0)))
    assert pictures(page) == ["The base with guidance scale 4.5", "Iteration 0"] and "radio" not in page.html


def test_photographs_are_kept_small(tmp_path, no_charts):
    """24 prompts, 8 pictures each, of 512 pixels with noise in them: the worst that can be shown."""
    folder = fake_run(tmp_path, metrics(120, every=20))
    write_samples(folder, range(0, 140, 20), prompts(24), size=512)
    noise = np.random.default_rng(0).integers(0, 40, (1536, 4096, 3), dtype=np.uint8)
    for path in (folder / "samples").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2 + noise).save(path, compress_level=1)
    path = write_report(folder)
    assert len(Page(path).images) == 24 * 7 and path.stat().st_size < 12e6
