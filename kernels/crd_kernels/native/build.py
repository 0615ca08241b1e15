"""Compiles the package's C++ once per machine with the system's compiler and loads it through ctypes.

No header of torch is needed, so the compiler runs for a few seconds only. The library is kept in
$CRD_KERNELS_CACHE, or the user's cache directory, under a name that covers the source, the compiler, the
processor, and the library's own bytes: a file that was cut short is compiled again and never loaded. Where
nothing can be kept, each process compiles its own. Without a compiler `library()` is None and the ops run
their definition.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SOURCES = [
    PACKAGE / "velocity" / "velocity.cpp",
    PACKAGE / "finish" / "finish.cpp",
    PACKAGE / "noise" / "interpolate.cpp",
]
HEADERS = [PACKAGE / "native" / "latents.h", PACKAGE / "native" / "philox.h"]
# The two -fno flags let square roots and selections vectorise; results and NaN stay IEEE's.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
FAILURES = (OSError, subprocess.SubprocessError)


def cache_directory():
    """Where compiled libraries are kept. Raises OSError where the user has no home."""
    if chosen := os.environ.get("CRD_KERNELS_CACHE"):
        return Path(chosen)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "crd_kernels"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(f"{error}") from error
    if not home.is_dir():
        raise NotADirectoryError(f"the home {home} is no folder")
    return home / ".cache" / "crd_kernels"


def compiler():
    """Path of $CXX or of the first C++ compiler found; None when there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def library():
    """The loaded library, or None where it cannot be built."""
    cxx = compiler()
    try:
        if cxx is None:
            raise OSError("no C++ compiler found ($CXX, c++, g++, clang++)")
        return _declare(_load(cxx))
    except FAILURES as error:
        reason = _reason(error)
        warnings.warn(
            f"crd_kernels: the C++ kernels could not be built, slower torch ops take their place: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _load(cxx):
    """The library out of the cache directory, or of a temporary one where that cannot be used."""
    try:
        return ctypes.CDLL(str(_build(cxx, cache_directory())))
    except FAILURES as error:
        refused = _reason(error)
    with tempfile.TemporaryDirectory(prefix="crd_kernels-") as folder:
        loaded = ctypes.CDLL(str(_build(cxx, Path(folder))))  # needs its file no longer
    warnings.warn(
        f"crd_kernels: the compiled C++ kernels cannot be kept ({refused}), so that each process spends some "
        "seconds on compiling them: name a folder that can be written to in CRD_KERNELS_CACHE",
        RuntimeWarning,
        stacklevel=3,
    )
    return loaded


def _build(cxx, folder):
    """Path of the library in `folder`: the one that is there and whole, or a new one."""
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    text = [path.read_text() for path in SOURCES + HEADERS]
    prefix = "crd_kernels-" + _digest("\n".join([*text, cxx, version, _processor(), *FLAGS]).encode())
    for kept in folder.glob(f"{prefix}-*.so"):
        if kept.name == f"{prefix}-{_digest(kept.read_bytes())}.so":
            return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        built = _compile(cxx, Path(inside) / "library.so")
        target = folder / f"{prefix}-{_digest(built.read_bytes())}.so"
        os.replace(built, target)  # atomic: another process may be building the same
    return target


def _compile(cxx, built):
    """Tries the best flags first: not every compiler has OpenMP or knows `native`."""
    choices = [("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"), ("-fopenmp-simd",), ()]
    for extra in choices:
        command = [cxx, *FLAGS, *extra, f"-I{PACKAGE / 'native'}", *map(str, SOURCES), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return built
    result.check_returncode()


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:20]


def _reason(error):
    return getattr(error, "stderr", None) or error


def _processor():
    """What -march=native depends on, so that a home shared by two machines serves both."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _declare(lib):
    pointer, word, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    lib.crd_measure.argtypes = [pointer, real, real, word, word, word, pointer, word]
    lib.crd_gradient.argtypes = [pointer, real, word, *[pointer] * 4, word, word]
    lib.crd_interpolate.argtypes = [pointer, pointer, word, word]
    lib.crd_finish.argtypes = [pointer] * 5
    for function in (lib.crd_measure, lib.crd_gradient, lib.crd_finish, lib.crd_interpolate):
        function.restype = None
    return lib
