"""Compiles the package's C++ once per machine with the system's compiler and loads it through ctypes.

No header of torch is needed, so the compiler runs for a few seconds only. The library is kept in
$CRD_KERNELS_CACHE, or the user's cache directory, under a name that covers the source, the compiler and the
processor. Without a compiler `library()` is None and the ops run tile by tile (velocity/tiles.py).
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


def cache_directory():
    if chosen := os.environ.get("CRD_KERNELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crd_kernels"


def compiler():
    """Path of $CXX or of the first C++ compiler found; None when there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def library():
    """The loaded library, or None where it cannot be built."""
    try:
        return _declare(ctypes.CDLL(str(_build())))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"crd_kernels: the C++ kernels could not be built, the cpu ops run tile by tile: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _build():
    cxx = compiler()
    if cxx is None:
        raise OSError("no C++ compiler found ($CXX, c++, g++, clang++)")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    text = [path.read_text() for path in SOURCES + HEADERS]
    key = "\n".join([*text, cxx, version, _processor(), *FLAGS])
    name = f"crd_kernels-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    folder = cache_directory()
    if not (folder / name).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(cxx, folder / name)
        except PermissionError:
            folder = Path(tempfile.mkdtemp(prefix="crd_kernels-"))
            _compile(cxx, folder / name)
    return folder / name


def _compile(cxx, target):
    """Tries the best flags first: not every compiler has OpenMP or knows `native`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / "library.so"
        choices = [("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"), ("-fopenmp-simd",), ()]
        for extra in choices:
            command = [cxx, *FLAGS, *extra, f"-I{PACKAGE / 'native'}", *map(str, SOURCES), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                os.replace(built, target)  # atomic: another process may be building the same
                return
        result.check_returncode()


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
    lib.crd_chunk.restype = word
    lib.crd_measure.argtypes = [pointer, real, real, word, word, word, pointer, pointer, word]
    lib.crd_gradient.argtypes = [pointer, real, word, *[pointer] * 4, word, word]
    lib.crd_interpolate.argtypes = [pointer, pointer, word, word]
    lib.crd_finish.argtypes = [pointer] * 5
    for function in (lib.crd_measure, lib.crd_gradient, lib.crd_finish, lib.crd_interpolate):
        function.restype = None
    return lib
