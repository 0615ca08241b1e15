"""Triton's cache with files that were cut short: compiled again, never loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def python(code, cache, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, "TRITON_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
    )


# One kernel compiled by the package's own launcher for a GPU that is not here, as often as it is called.
KERNEL = """
import sys
from pathlib import Path
from crd_kernels import launch
from crd_kernels.noise.triton import interpolate_kernel
from tools import compile_kernels as tool
from triton import knobs
from triton.runtime import driver

driver.set_active(tool.CompileOnly("sm_90"))
launch.target.cache_clear()
hits = []
knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)


def taken_from_cache():
    interpolate_kernel.device_caches.clear()  # as in a process that begins
    tool.compile_case(tool.Case("interpolate", "bf16", reference="none"), "sm_90")
    return hits.pop()


def files():
    return {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


cache = Path(knobs.cache.dir)
"""

DAMAGED = (
    KERNEL
    + """
assert not taken_from_cache()
assert taken_from_cache()
whole = files()
assert {path.suffix for path in whole} >= {".cubin", ".ptx", ".json", ".sha256"}, list(whole)
damaged = [path for path in whole if path.suffix != ".sha256" or not path.name.startswith("__grp__")]
for path in damaged:
    for left in (0, 0.5, 1) if path.suffix == ".cubin" else (0.5,):
        path.write_bytes(whole[path][: int(left * (len(whole[path]) - 1))])
        assert not taken_from_cache(), (path.name, left)
        assert files() == whole, (path.name, left)
assert taken_from_cache()
print(len(damaged))
"""
)


@pytest.mark.slow
def test_a_kernel_s_files_that_were_cut_short_are_compiled_again(tmp_path):
    done = python(DAMAGED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 6


OTHERS = (
    KERNEL
    + """
from triton.runtime.cache import FileCacheManager

knobs.cache.manager_class = FileCacheManager
assert not taken_from_cache() and taken_from_cache()
assert knobs.cache.manager_class is FileCacheManager  # whoever chose one keeps it
assert not [path for path in files() if path.suffix == ".sha256"]
del knobs.cache.manager_class
assert not taken_from_cache() and taken_from_cache()
assert knobs.cache.manager_class is None
"""
)


@pytest.mark.slow
def test_what_others_kept_without_a_hash_is_compiled_once_more(tmp_path):
    done = python(OTHERS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


# As Triton compiles and loads the library that speaks to the driver.
LIBRARY = """
from crd_kernels.compiled_files import whole_files
from triton.runtime.build import compile_module_from_src

SOURCE = '''
#include <Python.h>
static char padding[1 << 16] = {1};
static PyObject *seven(PyObject *self, PyObject *none) { return PyLong_FromLong(6 + padding[0]); }
static PyMethodDef methods[] = {{"seven", seven, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "speaks", NULL, -1, methods};
PyMODINIT_FUNC PyInit_speaks(void) { return PyModule_Create(&module); }
'''
with whole_files():
    print(compile_module_from_src(SOURCE, "speaks").seven())
"""


@pytest.mark.slow
def test_a_library_of_triton_s_that_was_cut_short_is_compiled_again(tmp_path):
    """Loading it would end the process."""
    first = python(LIBRARY, tmp_path)
    if "Python.h" in first.stderr or "C compiler" in first.stderr:
        pytest.skip("no C compiler with Python's headers")
    assert first.stdout == "7\n", first.stderr[-3000:]
    (library,) = tmp_path.rglob("speaks*.so")
    whole = library.read_bytes()
    os.truncate(library, len(whole) // 2)
    again = python(LIBRARY, tmp_path)
    assert (again.returncode, again.stdout) == (0, "7\n"), again.stderr[-3000:]
    assert library.stat().st_size == len(whole)
