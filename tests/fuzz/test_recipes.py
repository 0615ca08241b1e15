"""Recipes with anything in any place: taken as they are written, or refused in one line."""

import math
import tempfile
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from crd_fast.config import RECIPES, Recipe, build_recipe, load_recipe
from tests.fuzz.budget import answer, cases

DEFAULTS = {
    f"{section}.{key}": value
    for section, values in Recipe().model_dump().items()
    for key, value in values.items()
}
KEYS = st.sampled_from(sorted(DEFAULTS)) | st.sampled_from(
    [
        "rewards.ocr",
        "rewards.my_module:f",
        "eval_rewards.pickscore",
        "train.lr",
        "modle.path",
        "rewards.ocr.mode",
    ]
)
NUMBERS = st.integers(-3, 100) | st.integers() | st.floats() | st.sampled_from([0, 1, 0.5, 10**400, -0.0])
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=12)
    | st.sampled_from([str(value) for value in DEFAULTS.values()])
    | st.sampled_from(["all", "auto", "mean", "full", "0/0.25/0.005/0.999", "75/0/nan/1", "1/2", "512x768"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | SCALARS, inner, max_size=3)
    ),
    max_leaves=5,
)
# what means something to YAML
TEXTS = st.text(max_size=16) | st.sampled_from(
    [
        *(
            "017",
            "018",
            "0x1F",
            "0b11",
            "1_000",
            "1:30",
            "1e3",
            "1e999",
            ".inf",
            "-.inf",
            ".nan",
            "3e-4",
            "+1",
        ),
        *("yes", "off", "~", "null", "''", '"', "[", "{a: 1, a: 2}", "[1, 2", "!!python/object:os.system x"),
        *("!!int x", "!!float yes", "!!binary x", "!!set {a}", "!!timestamp x", "2026-99-01", "2026-01-01"),
        *("&a [*a]", "*a", "<<: *a", "<<: 3", "? [a]", "- a", "|\n    a", "a: b: c", "#", "%x", "\t", "\x00"),
        *(
            "{[1]: 2}",
            "{{}: 1}",
            "---",
            "...",
            "\ufeff",
            "\ud800",
            "\x85",
            "[" * 50,
            "1" * 5000,
            "{<<: [1]}",
        ),
    ]
)


WORDS = ("0", "f", "n", "no", "off", "false"), ("1", "t", "y", "yes", "on", "true")  # False, True


def agrees(given, got):
    """Whether a value was taken as it was written."""
    if isinstance(got, bool):
        return given == got or str(given).lower() in WORDS[got]
    if isinstance(given, bool) or given is None or got is None:
        return given is got
    if isinstance(given, float) and math.isnan(given):
        return False
    if isinstance(got, dict):
        return isinstance(given, dict) and given == got
    if isinstance(got, list):
        return isinstance(given, list) and given == got
    try:
        return given == got or math.isclose(float(given), float(got), rel_tol=1e-15)
    except (TypeError, ValueError, OverflowError):
        return False


def kept(recipe):
    """It can be written down and read again."""
    assert build_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@cases(300)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_values(values):
    sections = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    recipe = answer("recipes", build_recipe, sections)
    if recipe is not None:
        for key, value in values.items():
            section, _, name = key.partition(".")
            got = recipe.model_dump()[section][name]
            assert agrees(value, got), (key, value, got)
        kept(recipe)


@cases(200)
@given(st.lists(st.tuples(KEYS, TEXTS), min_size=1, max_size=3), st.booleans())
def test_texts(settings, as_file):
    if not as_file:
        recipe = answer("recipes", build_recipe, {}, [f"{key}={text}" for key, text in settings])
    else:
        lines = [f"{key.partition('.')[0]}:\n  {key.partition('.')[2]}: {text}\n" for key, text in settings]
        recipe = answer("recipes", from_bytes, "".join(lines).encode("utf-8", "surrogatepass"))
    if recipe is not None:
        kept(recipe)


def from_bytes(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        return load_recipe(path)


@cases(150)
@given(data=st.data())
def test_files_that_were_edited_badly(data):
    """A recipe that ships, with lines left out, said twice, moved, indented otherwise, and other bytes."""
    path = data.draw(st.sampled_from(sorted(RECIPES.glob("*.yaml"))))
    lines = path.read_bytes().splitlines(keepends=True)
    for _ in range(data.draw(st.integers(1, 3))):
        place, other = (data.draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        match data.draw(st.integers(0, 4)):
            case 0 if len(lines) > 1:
                del lines[place]
            case 1:
                lines.insert(other, lines[place])
            case 2:
                lines[place] = b" " * data.draw(st.integers(1, 3)) + lines[place]
            case 3:
                at = data.draw(st.integers(0, len(lines[place])))
                lines[place] = lines[place][:at] + data.draw(st.binary(max_size=3)) + lines[place][at:]
            case _:
                lines[place] = lines[place].replace(b":", b"", 1)
    recipe = answer("recipes", from_bytes, b"".join(lines))
    if recipe is not None:
        kept(recipe)


def test_a_value_that_is_changed_is_seen():
    assert agrees(3, 3.0) and agrees("1e-3", 1e-3)
    assert not agrees(True, 1) and not agrees(2.5, 2) and not agrees([1], 1) and not agrees(None, "None")
