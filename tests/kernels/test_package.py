"""What importing and building the package does and does not do."""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

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


def test_an_eager_call_does_not_import_dynamo():
    """It takes seconds, and nobody has asked for torch.compile."""
    code = (
        "import sys, torch, crd_kernels as k; x = torch.ones(2, 3, requires_grad=True); y = torch.ones(2, 3);"
        "k.crd_loss(x, y, None, y, y, torch.ones(2), torch.zeros(2, dtype=torch.long)).loss.backward();"
        "print('torch._dynamo' in sys.modules)"
    )
    assert python(code) == "False"


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
        "    stats = k.measure(x, x, x + 1, x, x)\n"
        "p, group = x.clone().requires_grad_(), torch.zeros(2, dtype=torch.long)\n"
        "advantage = torch.tensor([1.0, -1.0])\n"
        "set = dict(advantage=advantage, group=group, kl_beta=0.5)\n"
        "k.crd_loss(p, x, x + 1, x, x, **set).loss.backward()\n"
        "c = k.center(stats, **set)\n"
        "same = torch.equal(p.grad, k.velocity_grad(x, x + 1, x, x, c))\n"
        "print(stats.kl.sum().item(), same, round(p.grad.sum().item(), 5), [str(w.message) for w in seen])"
    )
    said = python(code, CXX="no-such-compiler", CRD_KERNELS_CACHE=str(tmp_path))
    assert "no C++ compiler found" in said
    assert python(code) == f"{said.partition(' [')[0]} []"


@pytest.fixture
def cxx(monkeypatch):
    """The system's compiler, told to be quick; in a folder that every user can read."""
    from crd_kernels.native import build

    found = build.compiler() or pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        quick = Path(folder) / "c++"
        quick.write_text(f'#!/bin/sh\nexec {found} "$@" -O0\n')
        for path in (quick, quick.parent):
            path.chmod(0o755)
        monkeypatch.setenv("CXX", str(quick))
        yield str(quick)


def test_compiles_once(tmp_path, cxx):
    from crd_kernels.native import build

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = build._build(cxx, tmp_path)
    stamp = first.stat().st_mtime_ns
    assert build._build(cxx, tmp_path) == first and first.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


CALLS = """
import warnings, torch, crd_kernels as k
from crd_kernels.native import build
x = torch.ones(2, 3)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    kl = k.measure(x, x, x + 1, x, x).kl
    k.interpolate(x, torch.ones(2), x)
print(build.library() is not None, kl.tolist(), len(seen), *(w.message for w in seen))
"""
NO_FOLDER = {
    "home does not exist": {"HOME": "nobody"},
    "cache below a file": {"XDG_CACHE_HOME": "file"},
    "cache on a file system that takes none": {"CRD_KERNELS_CACHE": "/proc/crd_kernels"},
}


@pytest.mark.slow
@pytest.mark.parametrize("environment", NO_FOLDER.values(), ids=NO_FOLDER)
def test_where_nothing_can_be_kept_it_says_so_once_and_compiles(environment, tmp_path, cxx):
    """In a temporary folder, gone afterwards. Not by permissions: root has them all."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "temporary").mkdir()
    environment = {name: str(tmp_path / value) for name, value in environment.items()}
    empty = dict.fromkeys({"XDG_CACHE_HOME", "CRD_KERNELS_CACHE"} - set(environment), "")
    said = python(CALLS, **empty, **environment, TMPDIR=str(tmp_path / "temporary"))
    assert said.startswith("True [1.0, 1.0] 1 ") and "cannot be kept" in said
    assert next(iter(environment.values())) in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "temporary"]
    assert not list((tmp_path / "temporary").glob("crd_kernels*"))


@pytest.mark.slow
def test_a_user_without_a_home(cxx):
    """A user id that no file knows, as containers often have it."""
    from crd_kernels.native import build

    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    if not all(folder.stat().st_mode & 0o005 == 0o005 for folder in build.PACKAGE.parents):
        pytest.skip("nobody else can read this checkout")
    said = python(
        "import os, torch, crd_kernels.velocity.cpu, crd_kernels.noise.cpu\n"
        "[os.environ.pop(name, None) for name in ('HOME', 'XDG_CACHE_HOME', 'CRD_KERNELS_CACHE')]\n"
        "os.setuid(12345)\n" + CALLS
    )
    assert said.startswith("True [1.0, 1.0] 1 ") and "cannot be kept" in said


@pytest.mark.slow
@pytest.mark.parametrize("left", [0.0, 0.999])
def test_a_library_that_was_cut_short_is_compiled_again(left, tmp_path, cxx):
    """Loading it would end the process (SIGBUS), or leave the slow path without a word."""
    from crd_kernels.native import build

    kept = build._build(cxx, tmp_path)
    content = kept.read_bytes()
    os.truncate(kept, int(left * len(content)))
    assert python(CALLS, CRD_KERNELS_CACHE=str(tmp_path)) == "True [1.0, 1.0] 0"
    assert content in [path.read_bytes() for path in tmp_path.iterdir()]


def test_every_public_parameter_has_a_type():
    import inspect

    import crd_kernels

    functions = [getattr(crd_kernels, name) for name in crd_kernels.__all__]
    functions += [crd_kernels.CRDLoss.forward, crd_kernels.Stats.cat]
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            given = parameter.annotation is not inspect.Parameter.empty
            assert given or parameter.name == "self", f"{function.__qualname__}: {parameter.name}"
