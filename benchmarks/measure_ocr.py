"""What the OCR reward reads of rendered words, and how long it takes: `python -m benchmarks.measure_ocr`.

200 words of 3 to 8 letters in DejaVu Sans, Serif and Mono at 32 and 64 pixels, black on white and in colours,
alone (`word`) and on a larger canvas (`scene`). Seconds are of one core, one onnxruntime thread, words in
batches of 24; `--no-time` leaves them out, for a machine that is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crd_fast.prompts.ocr_words import WORDS
from crd_fast.rewards.ocr import OCR, OCRDense
from crd_fast.run.machine import cpu_name, git_commit

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
SIZES = (32, 64)
COUNT, BATCH = 200, 24
RESULT = Path(__file__).parent / "results" / "ocr.json"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-time", action="store_true", help="leave the seconds out: the machine is busy")
    parser.add_argument("--scenes", type=int, default=COUNT, help="words that are also read in scene mode")
    arguments = parser.parse_args()
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
