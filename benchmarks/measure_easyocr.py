"""What a second reader, `easyocr`, reads beside `ocr`: `python -m benchmarks.measure_easyocr`.

The 200 words of benchmarks/measure_ocr.py, and 500 held-out signs as `builtin-ocr` was taught them, 20 pixels
high. With `--scenes 100` so many of the words instead, on larger canvases, where both readers have to find
them, and `easyocr` also at the size that it sees pictures in by default. Exact is without case, as the scores
are. Seconds are processor time of one core in batches of 24; `--no-time` leaves them out.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from benchmarks.measure_ocr import BATCH, RESULTS, blanks_and_noise, cases, render
from crd_fast.prompts import signs
from crd_fast.rewards.easyocr import EasyOCR
from crd_fast.rewards.ocr import OCR, TextReward, normalized, text_score
from crd_fast.run.machine import cpu_name, git_commit

SIGNS = 500
CANVAS = (256, 384)
RESULT, SCENES = RESULTS / "easyocr.json", RESULTS / "easyocr-scenes.json"


def read(reward: TextReward, images: list[np.ndarray]) -> tuple[list[str], float]:
    """The texts, and seconds of the processor a picture."""
    texts, started = [], time.process_time()
    for start in range(0, len(images), BATCH):
        texts += reward.read(images[start : start + BATCH])
    return texts, (time.process_time() - started) / len(images)


def compare(images: list[np.ndarray], wanted: list[str], **settings) -> dict:
    """settings: of both readers."""
    exact, found = {}, {}
    readers: dict[str, TextReward] = {"ocr": OCR(**settings), "easyocr": EasyOCR(**settings)}
    if settings["mode"] == "scene":
        readers["easyocr_by_default"] = EasyOCR(mode="scene")
    for name, reward in readers.items():
        texts, seconds = read(reward, images)
        pairs = [(normalized(text), normalized(word)) for text, word in zip(texts, wanted)]
        exact[name] = np.array([text == word for text, word in pairs])
        found[name] = {
            "exact": float(exact[name].mean()),
            "mean_score": float(np.mean([text_score(text, word) for text, word in pairs])),
            "cpu_seconds_a_picture": seconds,
        }
    found["by_either"] = float((exact["ocr"] | exact["easyocr"]).mean())
    found["by_both"] = float((exact["ocr"] & exact["easyocr"]).mean())
    return {"pictures": len(images), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-time", action="store_true", help="leave the seconds out: the machine is busy")
    parser.add_argument("--scenes", type=int, default=0, help="words looked for on larger canvases")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {"cpu": cpu_name(), "commit": git_commit(), "date": time.strftime("%Y-%m-%d")}
    chosen = cases()
    if arguments.scenes:
        path, kinds, settings = SCENES, ["scenes"], {"mode": "scene", "side": min(CANVAS)}
        chosen = chosen[: arguments.scenes]
        images = [render(**case, canvas=CANVAS) for case in chosen]
        result |= {"canvas": CANVAS, "side": min(CANVAS)}
        result["scenes"] = compare(images, [case["text"] for case in chosen], **settings)
    else:
        path, kinds, settings = RESULT, ["words", "signs"], {"mode": "word"}
        rng = np.random.default_rng(0)
        words = [str(word) for word in rng.choice(signs.words(held_out=True), SIGNS)]
        images = [render(**case) for case in chosen]
        result["words"] = compare(images, [case["text"] for case in chosen], **settings)
        images = [signs.render(word, None, None, rng) for word in words]
        result["signs"] = compare(images, words, **settings)
    empty, reward = blanks_and_noise(), EasyOCR(**settings)
    scores = [reward.score(image[None], ['a sign that says "CAT"'], [{}])[0] for image in empty]
    result |= {"blank_and_noise_images": len(empty), "blank_and_noise_highest_score": max(scores)}
    if arguments.no_time:
        for kind in kinds:
            for found in result[kind].values():
                if isinstance(found, dict):
                    del found["cpu_seconds_a_picture"]
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
