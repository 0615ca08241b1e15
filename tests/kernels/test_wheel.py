"""The kernel package builds as a wheel of its own, with its C++ and without the trainer's dependencies."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel(tmp_path):
    source = tmp_path / "kernels"  # a copy: setuptools leaves its build folders behind
    shutil.copytree(
        ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    )
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("crd_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        archive.extractall(tmp_path / "installed")
    required = sorted(
        line.split(":", 1)[1].split(">")[0].strip() for line in lines if line.startswith("Requires-Dist")
    )
    assert required == ["torch", "triton"]
    shipped = {path.relative_to(source).as_posix() for path in (source / "crd_kernels").rglob("*.*")}
    assert {name for name in shipped if name.endswith((".py", ".cpp", ".h"))} <= set(names)

    code = (
        "import crd_kernels as k, torch; x = torch.ones(2, 3); print(k.__file__, k.measure(x, x, x, x, x).kl)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout
