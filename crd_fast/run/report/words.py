"""How the page words names, numbers and times."""

import math


def label(name: str) -> str:
    """`two_object` as people write it: `Two object`."""
    if ":" in name:  # a reward of one's own: module:name
        return name
    text = name.replace("_", " ").replace("kl", "KL").strip()
    return text[:1].upper() + text[1:]


def sentence(line: str) -> str:
    """A line of a log as a sentence."""
    line = line.strip()
    return line[:1].upper() + line[1:] + ("" if line.endswith((".", "!", "?")) else ".")


def digits(error: float | None, least: int = 2) -> int:
    """Decimals that a value wants beside its error: as many as show the error's first digit."""
    if not error or not math.isfinite(error):
        return least
    return min(8, max(least, -math.floor(math.log10(error))))


def signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def counted(iterations: int) -> str:
    return f"{iterations} iteration" + ("" if iterations == 1 else "s")
