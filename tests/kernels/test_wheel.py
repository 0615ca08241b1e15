"""The two wheels: what is in them, and that neither overwrites or breaks the other."""

import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import crd_kernels
import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-index", "--no-build-isolation"]
MEASURE = (
    "import crd_kernels as k, torch; x = torch.ones(2, 3); print(k.__file__, k.measure(x, x, x, x, x).kl)"
)
TRAINER = "import crd_fast.config, crd_fast.train.update; print(crd_fast.__file__)"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, as setuptools leaves its build folders behind."""
    copy = tmp_path_factory.mktemp("wheels") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    for name in ("crd_fast", "kernels"):
        leave = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=leave)
    return copy


@pytest.fixture(scope="module")
def wheels(checkout):
    """name -> wheel, built from the checkout."""
    target = checkout.parent / "dist"
    arguments = ["wheel", *OFFLINE, "--no-deps", "--quiet", "--wheel-dir", str(target)]
    subprocess.run([*PIP, *arguments, str(checkout / "kernels"), str(checkout)], check=True)
    return {path.name.partition("-")[0]: path for path in target.glob("*.whl")}


def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return importlib.metadata.PathDistribution(zipfile.Path(wheel, name.partition("/")[0] + "/")).metadata


@pytest.mark.parametrize("name", ["crd_fast", "crd_kernels"])
def test_licence(name, wheels):
    assert metadata(wheels[name])["License-Expression"] == "Apache-2.0"
    (licence,) = (path for path in files(wheels[name]) if path.endswith("LICENSE"))
    with zipfile.ZipFile(wheels[name]) as archive:
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_package_s_wheel_has_its_notice_and_is_typed(wheels):
    shipped = files(wheels["crd_fast"])
    assert "crd_fast/py.typed" in shipped and any(path.endswith("/NOTICE") for path in shipped)


def test_the_kernels_wheel_has_every_file_and_few_needs(wheels):
    source = ROOT / "kernels"
    shipped = {path.relative_to(source).as_posix() for path in (source / "crd_kernels").rglob("*.*")}
    kept = {name for name in shipped if name.endswith((".py", ".cpp", ".h", "py.typed"))}
    assert kept <= files(wheels["crd_kernels"]) and "crd_kernels/py.typed" in kept
    needs = metadata(wheels["crd_kernels"]).get_all("Requires-Dist")
    assert sorted(need.partition(">")[0] for need in needs) == ["torch", "triton"]
    assert metadata(wheels["crd_kernels"])["Version"] == crd_kernels.__version__


def test_they_share_no_file_and_one_needs_the_other(wheels):
    assert not files(wheels["crd_fast"]) & files(wheels["crd_kernels"])
    assert f"crd-kernels=={crd_kernels.__version__}" in metadata(wheels["crd_fast"]).get_all("Requires-Dist")


def test_either_can_be_removed_and_the_other_is_whole(wheels, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"

    def pip(*arguments):
        subprocess.run([*PIP, "--python", str(python), "--quiet", *map(str, arguments)], check=True)

    def run(code):
        """What `code` prints with the packages that both need; editable installs are not seen from there."""
        ended = subprocess.run(
            [str(python), "-W", "error::RuntimeWarning", "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": site.getsitepackages()[0]},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    pip("install", *OFFLINE, "--no-deps", *wheels.values())
    assert str(tmp_path) in run(MEASURE)
    assert str(tmp_path) in run(TRAINER)
    pip("uninstall", "--yes", "crd-fast")
    assert str(tmp_path) in run(MEASURE)
    pip("install", *OFFLINE, "--no-deps", wheels["crd_fast"])
    pip("uninstall", "--yes", "crd-kernels")
    installed = set(files(wheels["crd_fast"]))
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    assert all((packages / name).exists() for name in installed)
    pip("install", *OFFLINE, "--no-deps", wheels["crd_kernels"])
    assert str(tmp_path) in run(TRAINER)


def test_a_checkout_installs_as_the_readme_says(checkout):
    """Offline, with the packages that both need installed."""
    said = subprocess.run(
        [*PIP, "install", "--dry-run", *OFFLINE, "./kernels", "."],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert "crd-fast-" in said.stdout and f"crd-kernels-{crd_kernels.__version__}" in said.stdout
    assert "pip install ./kernels ." in (ROOT / "README.md").read_text()
