"""Folders as runs leave them, made by hand, and their report read back."""

import json
import math
import random
import re
from html.parser import HTMLParser

import numpy as np
import yaml
from PIL import Image, ImageDraw
from scipy import stats

from crd_fast.run.report import write_report
from crd_fast.run.scores import Scores, guided_base_path, scores_path, write_scores

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
    means = {"eval/overall": overall, "eval/clean": clean, "eval/reward_mean": 0.5 + overall / 2}
    return {"eval/images": 384} | means | values | {"seconds_eval": 9.5}


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


def scores_of(row, each=2, wobble=0.6, trained=False):
    """64 pictures of each category, `each` of one prompt, whose means are those of the row.

    wobble: how much pictures differ from what they were at iteration 0, as standard deviations go.
    """
    place = np.arange(64)
    own, changed = (((factor * place) % 64 - 31.5) / 18.5 for factor in (7, 13))  # standard deviation 1
    change = wobble * changed * bool(row["iteration"])
    names, values = list(CATEGORIES), {"reward": [], "overall": [], "clean": []}
    for number, category in enumerate(names):
        for name, mean in [("reward", row["eval/reward_mean"]), ("overall", row[f"eval/{category}"])]:
            values[name] += list(mean + 0.4 * (own + change))
        values["clean"] += list(row["eval/clean"] + 0.4 * (own + np.roll(change, number)))
    for key in (key for key in row if key.startswith("eval/judge/")):
        rest = 5 * np.tile(own + change, len(names))
        values[key.removeprefix("eval/")] = row[key] + rest
    count = 64 * len(names)
    return Scores(
        index=[i // each for i in range(count)],
        prompts=[f"prompt {i // each}" for i in range(count)],
        seeds=[1000 + i for i in range(count)],
        categories=[name for name in names for _ in place],
        trained=[trained if trained is None else i // each < trained for i in range(count)],
        values={name: np.array(value) for name, value in values.items()},
    )


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


def guided_base(folder, progress=0.5, scale=4.5, **options):
    """What the evaluation of the base with guidance leaves in the first row and in the folder."""
    row = {"iteration": 1} | evaluation(progress) | {"eval/judge/quality": 51.0}
    write_scores(guided_base_path(folder), scores_of(row, **{"wobble": 0.3} | options))
    found = {f"guided_base/{name.removeprefix('eval/')}": value for name, value in row.items() if "/" in name}
    del found["guided_base/images"]
    return found | {"guided_base/guidance_scale": scale, "seconds_guided_base": 19.0}


def fake_run(folder, rows, prompts=(), sampled=(), config=CONFIG, **options):
    """options: of `scores_of`; where a row has no categories, its pictures' scores are not kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if "eval/clean" in row:
            write_scores(scores_path(folder, row["iteration"]), scores_of(row, **options))
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
        self.cells = [" ".join(cell.split()) for cell in self.cells]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "br", "link", "input"):
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
            self.cells[-1] += data

    def row(self, name):
        start = self.cells.index(name)
        return self.cells[start + 1 : start + 4]

    def direction(self, name):
        """The class of the cell with the row's difference."""
        return re.search(rf">{name}</th>.*?<td class=\"(\w*)\"", self.html, flags=re.DOTALL)[1]

    def charts(self):
        return re.findall(r"<h3>([^<]*)</h3>\s*<p>[^<]*</p>\s*</div>\s*<svg", self.html)


def paired(rows, measure, chosen=slice(None), **options):
    """scipy's paired t-test of the first and the last row, prompts as the units."""
    values = [scores_of(row, **options).values[measure][chosen].reshape(-1, 2).mean(axis=1) for row in rows]
    return stats.sem(values[1] - values[0]), stats.ttest_rel(values[1], values[0]).pvalue


def report(folder, *arguments, **options):
    return Page(write_report(fake_run(folder, *arguments, **options)))
