"""What the OCR reward reads of rendered words, and how long it takes: `python -m benchmarks.measure_ocr`.

200 words of 3 to 8 letters in DejaVu Sans, Serif and Mono at 32 and 64 pixels, black on white and in colours,
alone (`word`) and on a larger canvas (`scene`). Seconds are of one core, one onnxruntime thread, words in
batches of 24; `--no-time` leaves them out, for a machine that is busy.

`--workers 1 2` compares scene mode with so many processes instead, in turns: pictures a second; the processor
time that the workers got for each second, which is what other work on the machine left them; and the share of
the time in which a worker had a call to work at, which is what the engine left them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageFont

from crd_fast.prompts.ocr_words import WORDS
from crd_fast.rewards import Rewards
from crd_fast.rewards.ocr import OCR, OCRDense
from crd_fast.run.machine import cpu_name, git_commit

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
SIZES = (32, 64)
COUNT, BATCH = 200, 24
ROUNDS, CALLS, SAMPLES = 3, 16, 3  # of a comparison of workers; a call has one prompt's samples
RESULTS = Path(__file__).parent / "results"
RESULT, WORKERS = RESULTS / "ocr.json", RESULTS / "ocr-workers.json"


def render(text: str, font: str, size: int, ink=(0, 0, 0), paper=(255, 255, 255), canvas=None) -> np.ndarray:
    """uint8 (H, W, 3): the text with a margin, or in the middle of a `canvas` (height, width)."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    drawn = ImageFont.truetype(str(path), size)
    left, top, right, bottom = drawn.getbbox(text)
    margin = size // 4
    height, width = canvas or (bottom - top + 2 * margin, right - left + 2 * margin)
    image = Image.new("RGB", (width, height), paper)
    corner = ((width - right - left) / 2, (height - bottom - top) / 2)
    ImageDraw.Draw(image).text(corner, text, font=drawn, fill=ink)
    return np.asarray(image)


def cases(count: int = COUNT, seed: int = 0) -> list[dict]:
    """Words with their fonts, sizes and colours, the same ones every time."""
    rng = np.random.default_rng(seed)
    known = [word for word in WORDS if 3 <= len(word) <= 8]
    chosen = []
    for i, word in enumerate(rng.choice(known, count, replace=False)):
        paper = rng.integers(170, 256, 3)
        ink = rng.integers(0, 90, 3)
        if rng.random() < 0.5:
            ink, paper = paper, ink
        chosen.append(
            {
                "text": str(word).upper() if i % 2 else str(word),
                "font": FONTS[i % len(FONTS)],
                "size": SIZES[i // len(FONTS) % len(SIZES)],
                "ink": (0, 0, 0) if i % 4 < 2 else tuple(ink.tolist()),
                "paper": (255, 255, 255) if i % 4 < 2 else tuple(paper.tolist()),
            }
        )
    return chosen


def measure(reward: OCR, images: list[np.ndarray], wanted: list[str]) -> dict:
    read, started, cpu = [], time.perf_counter(), time.process_time()
    for start in range(0, len(images), BATCH):
        read += reward.read(images[start : start + BATCH])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    wrong = [f"{text}: {found}" for text, found in zip(wanted, read) if found != text]
    return {
        "exact": 1 - len(wrong) / len(wanted),
        "exact_without_case": float(np.mean([a.lower() == b.lower() for a, b in zip(read, wanted)])),
        "wrong": wrong,
        "seconds_a_word": seconds / len(wanted),
        "cpu_seconds_a_word": cpu / len(wanted),
    }


def blanks_and_noise(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    images = [np.full((64, 128, 3), value, dtype=np.uint8) for value in (0, 90, 128, 255)]
    images += [
        rng.integers(0, 256, (64, width, 3), dtype=np.uint8) for width in (64, 128, 256) for _ in range(8)
    ]
    images += [rng.normal(128, 30, (64, 128, 3)).clip(0, 255).astype(np.uint8) for _ in range(8)]
    return images


class Recorded(OCR):
    """Leaves in a folder when each call began and ended."""

    def __init__(self, folder: str):
        super().__init__()
        self.file = Path(folder) / str(os.getpid())

    def score(self, images, prompts, metadata):
        started = time.monotonic()
        scores = super().score(images, prompts, metadata)
        with self.file.open("a") as file:
            file.write(f"{started} {time.monotonic()}\n")
        return scores


def calls_between(folder: str, begin: float, end: float) -> list[float]:
    """How long each call took that lies between the two times, by any process."""
    lines = [line.split() for file in Path(folder).iterdir() for line in file.read_text().splitlines()]
    times = [(float(started), float(ended)) for started, ended in lines]
    return [ended - started for started, ended in times if begin <= started and ended <= end]


def compare_workers(counts: list[int]) -> None:
    """Scene mode by each number of workers in turn."""
    chosen = cases()[: CALLS * SAMPLES]
    images = np.stack([render(**case, canvas=(256, 384)) for case in chosen])
    metadata = [{"prompt": f'a sign that says "{case["text"]}"'} for case in chosen]
    name = "benchmarks.measure_ocr:Recorded"
    turns: dict[int, list[dict]] = {count: [] for count in counts}
    expected = None
    with tempfile.TemporaryDirectory() as folder:
        rewards = {count: Rewards({name: {"workers": count, "folder": folder}}) for count in counts}
        for turn in range(ROUNDS + 1):
            for count, reward in rewards.items():
                started, cpu = time.monotonic(), children_seconds()
                with reward.start() as scoring:
                    for part in np.split(np.arange(len(images)), CALLS):
                        scoring.put(images[part], [metadata[i] for i in part])
                    scores = scoring.results()[name].tolist()
                ended = time.monotonic()
                seconds, cpu = ended - started, children_seconds() - cpu
                if expected not in (None, scores):
                    raise AssertionError(f"{count} workers score otherwise")
                expected = scores
                calls = calls_between(folder, started, ended)
                assert len(calls) == CALLS
                if turn:  # in the first the workers start
                    at_work = sum(calls) / (count * seconds)
                    turns[count].append({"seconds": seconds, "cpu_seconds": cpu, "at_work": at_work})
        for reward in rewards.values():
            reward.close()
    result = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],  # of the machine, other work included
        "images": len(images),
        "images_a_call": SAMPLES,
        "workers": {str(count): summary(taken, len(images)) for count, taken in turns.items()},
    }
    WORKERS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def summary(turns: list[dict], images: int) -> dict:
    median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    return {
        "images_a_second": images / median["seconds"],
        "cpu_seconds_an_image": median["cpu_seconds"] / images,
        "cores": statistics.median(turn["cpu_seconds"] / turn["seconds"] for turn in turns),
        "at_work": median["at_work"],
        "turns": turns,
    }


def children_seconds() -> float:
    """Processor time of the processes that this one has started, so far."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-time", action="store_true", help="leave the seconds out: the machine is busy")
    parser.add_argument("--scenes", type=int, default=COUNT, help="words that are also read in scene mode")
    parser.add_argument("--workers", type=int, nargs="+", help="compare scene mode by so many processes")
    arguments = parser.parse_args()
    if arguments.workers:
        return compare_workers(arguments.workers)
    chosen = cases()
    wanted = [case["text"] for case in chosen]
    words = [render(**case) for case in chosen]
    result = {
        "cpu": cpu_name(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],  # of the machine, other work included
        "words": len(words),
        "word": measure(OCR(mode="word"), words, wanted),
    }
    scenes = [render(**case, canvas=(256, 384)) for case in chosen[: arguments.scenes]]
    result["scene"] = {"images": len(scenes), "canvas": [256, 384]}
    result["scene"] |= measure(OCR(mode="scene"), scenes, wanted[: len(scenes)])

    prompts = ['a sign that says "CAT"']
    empty = blanks_and_noise()
    dense = OCRDense()
    for mode in ("word", "scene"):
        scores = [OCR(mode=mode).score(image[None], prompts, [{}])[0] for image in empty]
        result[mode] |= {"blank_and_noise_images": len(empty), "blank_and_noise_highest_score": max(scores)}
    right = [
        dense.score(image[None], [f'a sign that says "{text}"'], [{}])[0]
        for image, text in zip(words, wanted)
    ]
    none = [dense.score(image[None], prompts, [{}])[0] for image in empty]
    result["dense"] = {
        "lowest_score_of_right_words": min(right),
        "highest_score_of_blank_and_noise": max(none),
        "lowest_score_of_blank_and_noise": min(none),
    }
    if arguments.no_time:
        for mode in ("word", "scene"):
            for key in ("seconds_a_word", "cpu_seconds_a_word"):
                del result[mode][key]
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
