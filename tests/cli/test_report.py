"""The report: read back from the page that a realistic, a stopped, an empty and a damaged run folder give."""

import base64
import io
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image, ImageDraw

from crd_fast.errors import UserError
from crd_fast.run import report as report_module
from crd_fast.run.report import write_report

CATEGORIES = {
    "single_object": (0.83, 0.95),
    "two_object": (0.41, 0.72),
    "counting": (0.38, 0.66),
    "colors": (0.66, 0.88),
    "position": (0.22, 0.41),
    "color_attr": (0.27, 0.25),
}
CONFIG = {
    "model": {
        "path": "builtin",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_targets": "default",
        "quantization": "none",
    },
    "rollout": {"prompts": "builtin", "prompts_per_iteration": 12, "samples_per_prompt": 8, "steps": 10},
    "rewards": {"geneval": 1.0},
    "advantage": {"std": "global", "aggregate": "sum", "clip": 5.0},
    "loss": {"beta": 30.0, "kl_beta": 0.1, "kl_min": 1e-4, "temperature": math.inf, "centering": "prompt"},
    "snapshots": {"old": "0/0.25/0.005/0.999", "sampler": "75/0/0.0075/0.999"},
    "train": {
        "iterations": 120,
        "steps_per_iteration": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "seed": 42,
    },
    "evaluate": {"every": 20, "prompts": "builtin-heldout", "steps": 40},
    "checkpoint": {"every": 20, "keep": 3},
}
COLORS = {"red": (235, 36, 36), "green": (30, 194, 51), "blue": (41, 82, 250), "yellow": (245, 224, 36)}


def evaluation(progress, clean_gain=0.1):
    values = {f"eval/{name}": start + progress * (end - start) for name, (start, end) in CATEGORIES.items()}
    overall = sum(values.values()) / len(values)
    clean = 0.36 + progress * clean_gain
    return values | {"eval/overall": overall, "eval/clean": clean, "eval/images": 384, "seconds_eval": 9.5}


def metrics_row(iteration, iterations, noise):
    progress = iteration / iterations
    decay = min(0.25 + 0.005 * 2 * iteration, 0.999)
    return {
        "iteration": iteration,
        "step": 2 * iteration,
        "reward_mean": 0.42 + 0.3 * progress + noise.gauss(0, 0.035),
        "reward_std": 0.44 - 0.08 * progress,
        "implicit_reward_mean": 0.004 * progress + noise.gauss(0, 0.0006),
        "policy_loss": 0.08 - 0.02 * progress,
        "kl_loss": 0.0004 + 0.001 * progress,
        "kl": 0.012 + 0.02 * math.sqrt(progress) + noise.gauss(0, 0.0008),
        "old_kl": 0.011 + 0.02 * progress,
        "old_deviation": 2.5e-5 * (1 + 2 * progress) + abs(noise.gauss(0, 3e-6)),
        "grad_norm": 0.45 + abs(noise.gauss(0, 0.12)),
        "old_decay": decay,
        "sampler_decay": decay,
        "seconds_rollout": 0.9 + noise.random() * 0.1,
        "seconds_reward": 0.08,
        "seconds_update": 2.1 + noise.random() * 0.3,
        "peak_rss_bytes": 1_450_000_000,
    }


def metrics(iterations, every=20, **options):
    noise = random.Random(0)
    rows = [{"iteration": 0, "step": 0} | evaluation(0, **options)]
    for iteration in range(1, iterations + 1):
        row = metrics_row(iteration, iterations, noise)
        rows.append(row | (evaluation(iteration / iterations, **options) if iteration % every == 0 else {}))
    return rows


def tile(draw, left, top, color, size):
    draw.rectangle([left + size // 4, top + size // 4, left + 3 * size // 4, top + 3 * size // 4], fill=color)


def write_samples(folder, iterations, prompts, size=32):
    """Each tile shows a square in the colour that its prompt names; before, every second one is grey."""
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "prompts.json").write_text(json.dumps(prompts))
    columns = min(8, len(prompts))
    for iteration in iterations:
        grid = Image.new("RGB", (columns * size, -(-len(prompts) // columns) * size), (23, 23, 28))
        for index, prompt in enumerate(prompts):
            color = next(value for name, value in COLORS.items() if name in prompt)
            wrong = iteration == 0 and index % 2
            tile(
                ImageDraw.Draw(grid),
                index % columns * size,
                index // columns * size,
                (128, 128, 128) if wrong else color,
                size,
            )
        grid.save(folder / "samples" / f"{iteration:06d}.png")


def fake_run(folder, rows, prompts=(), sampled=(), config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {
        "machine": "x86_64, Linux 6.1",
        "cpu": "Example 8-core CPU, 2 cores used",
        "gpu": None,
        "torch": "2.13.0+cpu",
        "diffusers": "0.42.1",
        "peft": "0.21.2",
        "bitsandbytes": "0.50.2",
        "crd_fast": "0.1.0",
        "commit": None,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    if sampled:
        write_samples(folder, sampled, list(prompts))
    return folder


def prompts(count):
    kinds = ("circle", "square", "cross", "ring")
    names = list(COLORS)
    return [f"a photo of {2 + i % 3} {names[i % 4]} {kinds[i // 4 % 4]}s, number {i}" for i in range(count)]


class Page(HTMLParser):
    """The page's text, its table's cells, its images, and every address it would load."""

    def __init__(self, path):
        super().__init__()
        self.text, self.cells, self.images, self.loads, self.tags = "", [], [], [], []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        assert not self.tags, f"never closed: {self.tags}"
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "br", "link"):
            self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.loads += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.tags and self.tags[-1] == tag:
            self.tags.pop()

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "style":
            return
        self.text += data if self.tags and self.tags[-1] == "b" else f"{data} "
        if "td" in self.tags or "th" in self.tags:
            self.cells[-1] = (self.cells[-1] + data).strip()

    def row(self, name):
        start = self.cells.index(name)
        return self.cells[start + 1 : start + 4]

    def charts(self):
        return re.findall(r"<h3>([^<]*)</h3>\s*<p>[^<]*</p>\s*</div>\s*<svg", self.html)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("runs") / "first run", metrics(120), prompts(32), (0, 20, 120))
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path)


def test_headline_says_the_result_and_its_error(full):
    # 0.4617 and 0.6450 of 384 images each: sqrt(0.4617 * 0.5383 / 384 + 0.645 * 0.355 / 384) = 0.035
    expected = "Held-out correctness rose from 0.46 to 0.65 in 120 iterations (+0.18, standard error 0.04)."
    assert expected in full.text


def test_table_has_every_category(full):
    assert full.row("Overall") == ["0.462", "0.645", "+0.183"]
    assert full.row("Clean") == ["0.360", "0.460", "+0.100"]
    assert full.row("Position") == ["0.220", "0.410", "+0.190"]
    assert full.row("Color attr") == ["0.270", "0.250", "−0.020"]
    assert "Images" not in full.cells


def test_charts(full):
    assert full.charts() == [
        "Held-out result",
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
    """24 of 32 prompts, each beside its own caption: the colour in the tile is the colour in the prompt."""
    assert len(full.images) == 48
    before, after = full.images[0::2], full.images[1::2]
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


@pytest.fixture
def no_charts(monkeypatch):
    """Drawing takes most of the time; tests of the words do without."""
    monkeypatch.setattr(report_module, "charts", lambda run: {})


def report(folder, *arguments, **options):
    return Page(write_report(fake_run(folder, *arguments, **options)))


def test_reward_hacking_is_named(tmp_path, no_charts):
    page = report(tmp_path, metrics(120, clean_gain=-0.12))
    assert "possible reward hacking" in page.text
    assert "fell by 0.12" in page.text


def test_small_difference_is_not_a_result(tmp_path, no_charts):
    rows = [
        {"iteration": 0, "step": 0, "eval/overall": 0.50, "eval/images": 96},
        metrics_row(1, 120, random.Random(0)) | {"eval/overall": 0.55, "eval/images": 96},
    ]
    assert "cannot tell from no change" in report(tmp_path, rows).text


def test_category_of_few_images_may_fall_unnoticed(tmp_path, no_charts):
    """A quarter of 4 images is noise, of 400 it is not."""
    for images, said in ((4, False), (400, True)):
        rows = [
            {"iteration": 0, "step": 0, "eval/overall": 0.5, "eval/counting": 0.50, "eval/images": images},
            metrics_row(1, 120, random.Random(0))
            | {"eval/overall": 0.5, "eval/counting": 0.25, "eval/images": images},
        ]
        assert ("Counting fell by 0.25" in report(tmp_path, rows).text) == said


def test_what_went_wrong_is_listed(tmp_path, no_charts):
    rows = metrics(40)
    rows[7]["policy_loss"] = math.nan
    rows[3]["reward_std"] = 0.0
    rows[40] |= {"eval/overall": 0.30, "eval/two_object": 0.11}
    for row in rows[5:]:
        row["grad_norm"] = 7.0
    text = report(tmp_path, rows).text
    for said in (
        "40 of 120 iterations",
        "Policy loss is not a finite number at iteration 7",
        "In 1 of 40 iterations all samples got the same reward",
        "clipped to 1.0 in 36 of 40",
        "Two object fell by 0.30",
        "The evaluation at iteration 20 was 0.25 better",
        "the held-out result did not",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("rows", "headline", "charts"),
    [
        ([], "No iteration of this run is finished yet", 0),
        (metrics(0), "Held-out correctness before training is 0.46, standard error 0.03.", 0),
        (metrics(1), "Held-out correctness before training is", 6),
        (metrics(1, every=1), "Held-out correctness rose from 0.46 to 0.65 in 1 iteration (", 7),
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
    assert "Held-out reward mean rose from -3.00 to 4.50" in page.text
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
    folder = fake_run(tmp_path, [])
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


def test_written_again(tmp_path):
    first = write_report(fake_run(tmp_path, metrics(2))).read_text()
    assert write_report(tmp_path).read_text() == first
    assert not list(tmp_path.glob("*.part"))
