"""How the page words names, numbers and times."""


def label(name: str) -> str:
    """`two_object` as people write it: `Two object`."""
    text = name.replace("_", " ").replace("kl", "KL").strip()
    return text[:1].upper() + text[1:]


def signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def counted(iterations: int) -> str:
    return f"{iterations} iteration" + ("" if iterations == 1 else "s")
