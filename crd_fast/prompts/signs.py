"""Signs with a short word on them: the prompts, the tokens and the pictures of the `builtin-ocr` task.

A prompt is `a sign that says "CAT"`, with the colour of the sign and the style of its letters named or left
open. The words are those of `ocr_words` with three to five letters, and no training prompt has a held-out
one.
"""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crd_fast.errors import UserError
from crd_fast.prompts import ocr_words

HEIGHT, WIDTH = 20, 64
LETTERS = range(3, 6)
PITCH = 10.4  # pixels from letter to letter, within half a pixel
COLORS = {
    "red": (200, 40, 40),
    "blue": (40, 70, 190),
    "green": (40, 140, 60),
    "yellow": (235, 210, 70),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
STYLES = {  # files and sizes, all of one width a letter: its place in the word is a place in the picture
    "plain": ("DejaVuSansMono.ttf", (17, 18)),
    "bold": ("DejaVuSansMono-Bold.ttf", (17, 18)),
    "italic": ("DejaVuSansMono-Oblique.ttf", (17, 18)),
    "serif": ("cmtt10.ttf", (19, 20)),
}
MAX_TOKENS = 13  # of the longest prompt: a red sign that says + five letters + in bold, and its end
_QUOTED = re.compile(r'"([^"]*)"')


def words(held_out: bool) -> list[str]:
    """In upper case, three to five letters."""
    return [word for word in ocr_words.words(held_out) if len(word) in LETTERS]


def prompt(word: str, color: str | None = None, style: str | None = None) -> str:
    named = f"a {color} sign" if color else "a sign"
    return f'{named} that says "{word}"' + (f" in {style}" if style else "")


def entries(held_out: bool) -> list[dict]:
    """All prompts, each `{"prompt", "text", "tag"}`, words, colours and styles mixed, always in one order."""
    found = [
        {"prompt": prompt(word, color, style), "text": word, "tag": "text"}
        for word in words(held_out)
        for color in (None, *COLORS)
        for style in (None, *STYLES)
    ]
    random.Random(0).shuffle(found)
    return found


def spell(text: str) -> str:
    """The prompt with its quoted word as one token a letter: the letter and its place from the middle.

    `"CAT"` becomes `c-2 a+0 t+2`, in half letters: where a letter is drawn depends on that. The empty prompt
    stays empty. Raises UserError without one quoted word of three to five letters.
    """
    if not text:
        return ""
    quoted = _QUOTED.findall(text)
    if len(quoted) != 1:
        raise UserError(
            f'prompt: expected one word in double quotes, like a sign that says "CAT", got {text!r}'
        )
    word = quoted[0]
    if len(word) not in LETTERS or not re.fullmatch("[A-Za-z]+", word):
        raise UserError(f"prompt: expected a word of 3 to 5 letters from A to Z in quotes, got {text!r}")
    letters = [f"{letter}{2 * k - len(word) + 1:+d}" for k, letter in enumerate(word.lower())]
    return _QUOTED.sub(" ".join(letters), text)


def vocabulary() -> set[str]:
    """The tokens of every prompt, spelled."""
    letters = {f"{chr(97 + k)}{place:+d}" for k in range(26) for place in range(-4, 5)}
    return {"a", "sign", "that", "says", "in", *COLORS, *STYLES, *letters}


@functools.cache
def _font(style: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / STYLES[style][0]), size)


def render(word: str, color: str | None, style: str | None, rng: np.random.Generator) -> np.ndarray:
    """A sign, uint8 (20, 64, 3). What is None is drawn at random, as are ink, size and place."""
    color = color or list(COLORS)[rng.integers(len(COLORS))]
    style = style or list(STYLES)[rng.integers(len(STYLES))]
    background = np.clip(np.array(COLORS[color]) + rng.integers(-15, 16, 3), 0, 255)
    dark = background @ (0.3, 0.59, 0.11) < 128
    ink = rng.integers(200, 256, 3) if dark else rng.integers(0, 60, 3)
    sizes = STYLES[style][1]
    font = _font(style, sizes[rng.integers(len(sizes))])
    left, top, right, bottom = font.getbbox(word)
    x = (WIDTH - (right - left)) // 2 - left + rng.integers(-1, 2)
    y = (HEIGHT - (bottom - top)) // 2 - top + rng.integers(-1, 2)
    picture = Image.new("RGB", (WIDTH, HEIGHT), tuple(background.tolist()))
    ImageDraw.Draw(picture).text((int(x), int(y)), word, font=font, fill=tuple(ink.tolist()))
    return np.asarray(picture)
