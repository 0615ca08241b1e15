"""The reward of this run: how good each picture is. Replace what `score` computes by what you want more of.

Try it on pictures that you have, before anything is trained:

    crd-fast score --reward my_reward.py:score --images FOLDER --prompts prompts.txt
"""

import numpy as np


def score(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
    """One number a picture, larger is better; any scale, as a prompt's pictures are compared with each other.

    images: uint8 (N, height, width, 3), pictures of one prompt, read-only. prompts: N strings. metadata: N
    dicts, each with `prompt` and whatever else its line of the prompts' file has.
    """
    return [float(image[..., 0].mean()) / 255 for image in images]  # redness
