"""Pages that say what the code says: links lead somewhere, commands and recipes are such, lists are whole."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from crd_fast import cli
from crd_fast.config import Recipe, build_recipe, load_recipe, recipe_names
from crd_fast.errors import UserError
from crd_fast.rewards import REWARDS
from crd_fast.sections import Section
from tools.settings_page import PAGE, page
from tools.study_tables import with_tables

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(kind):
    """(page, text) of the blocks of one language."""
    return [
        pytest.param(text, id=f"{path.relative_to(ROOT)}-{number}")
        for path in PAGES
        for number, (language, text) in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")))
        if language == kind
    ]


def commands(text):
    """The arguments of every crd-fast in a block of shell, whatever stands before it in its line."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "crd-fast" in words:
            yield words[words.index("crd-fast") + 1 :]


@pytest.mark.parametrize("path", ["README.md", "docs/quickstart.md"])
def test_what_the_first_steps_call_was_installed(path):
    """Somebody who has torch alone gets pytest, for the reward's own test, from the line that installs."""
    shell = [text for language, text in BLOCK.findall((ROOT / path).read_text()) if language == "bash"]
    installed = [word for text in shell for line in text.splitlines() for word in installs(line)]
    assert "pytest" in "".join(shell).partition("crd-fast init")[2] and "pytest" in installed


def installs(line):
    words = shlex.split(line, comments=True)
    return words[2:] if words[:2] == ["pip", "install"] else []


def test_settings_page_is_the_schema():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tools.settings_page"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_the_studies(path):
    text = path.read_text(encoding="utf-8")
    assert text == with_tables(text), "python -m tools.study_tables"


def test_every_key_is_explained():
    for section, field in Recipe.model_fields.items():
        kind = field.annotation
        inner = (
            kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {section: field}
        )
        for name, key in inner.items():
            assert len(key.description or "") > 5, f"{section}.{name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_are_commands(text):
    """Names of commands, options and their values; recipes that ship and settings of --set."""
    group = typer.main.get_command(cli.app)
    for arguments in commands(text):
        name, *rest = arguments
        if name == "...":
            continue
        command = group.commands[name]
        assert "..." not in rest, "an example can be copied"
        words = ["run" if word.startswith("runs/") else word for word in rest]
        context = command.make_context(name, words)
        recipe = context.params.get("recipe")
        if recipe in recipe_names():
            load_recipe(recipe, context.params.get("set_") or [])


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_are_recipes(text):
    values = yaml.safe_load(text)
    if not isinstance(values, dict) or not values.keys() <= Recipe.model_fields.keys():
        pytest.skip("no recipe")
    build_recipe(values)


def test_every_reward_is_on_its_page():
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in REWARDS if f"`{name}`" not in text] == []


def test_every_metric_is_on_its_page():
    """Those of a committed run, of which what follows a slash may be a name."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    lines = (ROOT / "docs" / "example-run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"iteration"}
    categories = {"eval/two_object", "eval/counting", "eval/colors", "eval/position", "eval/color_attr"}
    for name in logged - categories:
        general = re.sub(r"(reward|reward_std|reward_best|judge)/\w+$", r"\1/NAME", name)
        general = re.sub(r"^guided_base/(?!guidance_scale).+", "guided_base/NAME", general)
        assert f"`{general}`" in text, name


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").is_file()
    assert (tmp_path / "site" / "repository" / "benchmarks" / "results" / "ocr.json").is_file()


def test_a_command_that_is_none_is_found():
    group = typer.main.get_command(cli.app)
    (arguments,) = commands("A=b crd-fast train builtin --nonsense 3  # why\n")
    with pytest.raises(Exception, match="No such option"):
        group.commands["train"].make_context("train", arguments[1:])
    with pytest.raises(UserError):
        load_recipe("builtin", ["loss.bet=3"])
