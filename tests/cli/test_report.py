"""The report: read back from the page that a realistic, a stopped, an empty and a damaged run folder give."""

import base64
import io
import math
import random
import re

import pytest
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.run.report import write_report
from tests.cli.report_runs import (
    CATEGORIES,
    COLORS,
    Page,
    fake_run,
    metrics,
    metrics_row,
    prompts,
    report,
    write_samples,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("runs") / "first run", metrics(120), prompts(32), (0, 20, 120))
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path)


def test_charts(full):
    assert full.charts() == [
        "Held-out result",
        "Reward and judges",
        "Training reward",
        "Distance from the guided reference",
        "Signal of the implicit reward",
        "Losses",
        "Gradient norm",
        "Time",
    ]
    ids = re.findall(r'\bid="([^"]+)"', full.html)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', full.html)
    assert {a or b for a, b in used} <= set(ids)
    assert not re.search(r"#000[1-5]0[1-5]", full.html)


def test_loads_nothing(full):
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in full.loads)
    assert not re.search(r"@import|<script|<link|url\((?!#)", full.html)


def test_tiles_are_cut_right(full):
    """24 of 32 prompts, each beside its own caption: the colour in the tile is the colour in the prompt.

    The first grid, and beside it the two others, of which one is chosen.
    """
    assert len(full.images) == 72
    before, after = full.images[0::3], full.images[2::3]
    assert all(image["alt"].startswith("Iteration 20: a photo of") for image in full.images[1::3])
    wrong = 0
    for pair in zip(before, after):
        found = []
        for shown, iteration in zip(pair, (0, 120)):
            picture = Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2])))
            assert picture.size == (32, 32)
            assert shown["alt"].startswith(f"Iteration {iteration}: a photo of")
            found.append(picture.getpixel((16, 16)))
        color = next(value for name, value in COLORS.items() if name in pair[0]["alt"])
        assert found[1] == color
        wrong += found[0] == (128, 128, 128)
    assert 8 <= wrong <= 16
    numbers = [int(image["alt"].rpartition(" ")[2]) for image in after]
    assert numbers[0] == 0 and numbers[-1] == 31 and numbers == sorted(set(numbers))


def test_settings_and_environment(full):
    for said in ("samples_per_prompt 8", "old 0/0.25/0.005/0.999", "temperature .inf", "gpu null"):
        assert said in full.text
    assert "11,520" in full.text  # 120 iterations of 12 prompts and 8 samples
    assert "Before you trust this" not in full.text


def test_what_went_wrong_is_listed(tmp_path, no_charts):
    rows = metrics(40)
    rows[7]["policy_loss"] = math.nan
    rows[40] |= {f"eval/{name}": 0.338 for name in CATEGORIES}
    rows[40] |= {"eval/overall": 0.30, "eval/two_object": 0.11}
    for row in rows[5:]:
        row["grad_norm"] = 7.0
    text = report(tmp_path, rows).text
    for said in (
        "40 of 120 iterations",
        "Policy loss is not a finite number at iteration 7",
        "clipped to 1 in 36 of 40",
        "Two object fell by 0.30",
        "at iteration 20, 0.30 at the last",
        "the held-out result did not",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("rows", "headline", "charts"),
    [
        ([], "No iteration of this run is finished yet", 0),
        (metrics(0), "Held-out correctness before training is 0.46, standard error 0.03.", 0),
        (metrics(1), "Held-out correctness before training is", 6),
        (metrics(1, every=1), "Held-out correctness rose from 0.46 to 0.65 in 1 iteration (", 8),
        (metrics(1)[1:], "The training reward is 0.7", 6),
        (metrics(30)[1:20], "training reward went from", 6),
        ([{"iteration": 3, "reward_mean": None}], "No iteration", 5),  # nothing of old was measured
    ],
    ids=["nothing", "evaluated once", "one iteration", "one of one", "no evaluation", "stopped", "null"],
)
def test_partly_done(tmp_path, rows, headline, charts):
    page = report(tmp_path, rows)
    assert headline in page.text
    assert len(page.charts()) == charts


def test_other_reward_without_categories(tmp_path, no_charts):
    rows = [
        {"iteration": 0, "step": 0, "eval/reward_mean": -3.0},
        metrics_row(1, 120, random.Random(0)) | {"eval/reward_mean": 4.5},
    ]
    page = report(tmp_path, rows)
    assert (
        "Held-out reward mean went from -3.00 to 4.50 in 1 iteration (+7.50, standard error not" in page.text
    )
    assert page.row("Reward mean") == ["-3.000", "4.500", "+7.500"]


def test_damaged_files_are_said_and_survived(tmp_path, no_charts):
    folder = fake_run(tmp_path, metrics(20), prompts(5), (0, 20))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 21, "rew')
    picture = folder / "samples" / "000020.png"
    picture.write_bytes(picture.read_bytes()[:60])
    (folder / "environment.json").write_text("{")
    page = Page(write_report(folder))
    assert "Line 22 of metrics.jsonl is incomplete" in page.text
    assert "samples/000020.png could not be read" in page.text
    assert "environment.json could not be read" in page.text
    assert len(page.images) == 5


def test_prompts_are_text_and_large_tiles_are_shrunk(tmp_path, no_charts):
    folder = fake_run(tmp_path, metrics(0))
    write_samples(folder, (0,), ["<script>red & 'blue'</script>"], size=600)
    page = Page(write_report(folder))
    assert page.images[0]["alt"].endswith("<script>red & 'blue'</script>")
    assert "script" not in re.findall(r"<(\w+)", page.html)
    picture = Image.open(io.BytesIO(base64.b64decode(page.images[0]["src"].partition(",")[2])))
    assert picture.size == (256, 256)


@pytest.mark.parametrize("content", [None, b"model: [", b"\xff\xfe", b"just words"])
def test_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        write_report(tmp_path)
    assert "config.yaml" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_a_page_of_somebody_elses_is_left_alone(tmp_path, kind):
    fake_run(tmp_path, metrics(2))
    path = tmp_path / "report.html"
    {
        "file": lambda: path.write_text("<title>mine</title>"),
        "folder": path.mkdir,
        "link to nothing": lambda: path.symlink_to("nothing"),
    }[kind]()
    with pytest.raises(UserError, match="not written by crd-fast"):
        write_report(tmp_path)
    assert path.is_dir() or path.is_symlink() or path.read_text() == "<title>mine</title>"
    assert not (tmp_path / "nothing").exists()


def test_a_folder_that_takes_no_file(inside, tmp_path):
    fake_run(tmp_path, metrics(2))
    (tmp_path / "report.html.partial").mkdir()
    code, _, errors = inside("report", tmp_path)
    assert code == 2 and errors.startswith(f"error: {tmp_path / 'report.html'}: cannot be written: ")
    assert len(errors.splitlines()) == 1 and "traceback" not in errors
    assert "--out FILE writes it elsewhere" in errors
    before = sorted(tmp_path.rglob("*"))
    page = tmp_path.parent / "pages" / "page.html"
    code, said, errors = inside("report", tmp_path, "--out", page)
    assert code == 0 and said == f"report: {page}\n", errors
    assert Page(page).text and sorted(tmp_path.rglob("*")) == before


def test_written_again(tmp_path):
    first = write_report(fake_run(tmp_path, metrics(2))).read_text()
    assert write_report(tmp_path).read_text() == first
    assert not list(tmp_path.glob("*.part*"))
