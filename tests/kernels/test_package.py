"""What importing and building the package does and does not do."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("how", ["python -c", "pytest"])
def test_installed_package_called_kernels_is_not_shadowed(tmp_path, how):
    """Hugging Face's library is called `kernels`; diffusers, transformers and bitsandbytes import it."""
    installed = tmp_path / "site" / "kernels"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("WHO = 'installed'\n")
    if how == "python -c":
        assert python("import kernels; print(kernels.WHO)", PYTHONPATH=str(installed.parent)) == "installed"
        return
    probe = tmp_path / "test_probe.py"
    probe.write_text("def test_probe():\n    import kernels\n    assert kernels.WHO == 'installed'\n")
    run = f"import pytest; raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', {str(probe)!r}]))"
    python(run, PYTHONPATH=str(installed.parent))


def test_source_root_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_is_light():
    """Beside torch and the standard library nothing is imported; benchmarks/test_import.py times it."""
    code = (
        "import sys, torch; before = set(sys.modules); import crd_kernels;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    assert set(python(code).split()) <= {"crd_kernels", "torch"}


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, crd_kernels as k; x = torch.ones(2, 3);"
        "print(k.measure(x, x, x, x, x).kl.sum().item())"
    )
    assert python(code) == "0.0"


def test_without_a_compiler_it_says_so_and_works(tmp_path):
    code = (
        "import warnings, torch, crd_kernels as k; x = torch.ones(2, 3)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    kl = k.measure(x, x, x + 1, x, x).kl\n"
        "print(kl.tolist(), [str(w.message) for w in seen])"
    )
    said = python(code, CXX="no-such-compiler", CRD_KERNELS_CACHE=str(tmp_path))
    assert said.startswith("[1.0, 1.0] [") and "no C++ compiler found" in said


def test_compiles_once(tmp_path, monkeypatch):
    from crd_kernels.native import build

    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CRD_KERNELS_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = build._build()
    stamp = first.stat().st_mtime_ns
    assert build._build() == first and first.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_tiles_are_small_and_cover_everything():
    from crd_kernels.velocity import tiles

    for shape in [(1,), (63,), (100000,), (16, 64, 64), (3, 200000), (2, 3, 40000)]:
        seen = torch.zeros(shape)
        for index in tiles.tiles(shape):
            assert seen[index].numel() <= tiles.TILE
            seen[index] += 1
        assert (seen == 1).all()
