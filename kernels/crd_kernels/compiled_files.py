"""What Triton has compiled and kept, of which only whole files are loaded.

Triton takes whatever it finds under a kernel's name. A file that was cut short, by a full disk or a lost
power supply, then reaches the GPU's driver or the dynamic loader: that is an error far from its cause, or the
end of the process (SIGBUS). Here a hash lies beside each file, and what does not have it is compiled again.
"""

import contextlib
import hashlib
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager

BESIDE = ".sha256"


class WholeFiles(FileCacheManager):
    """Triton's own cache, in the same folder. A file without a hash, of a process without this, is none."""

    def get_file(self, filename):
        path = super().get_file(filename)
        return path if path is not None and _is_whole(path) else None

    def get_group(self, filename):
        group = super().get_group(filename)
        return group if group is not None and all(map(_is_whole, group.values())) else None

    def put(self, data, filename, binary=True):
        path = super().put(data, filename, binary)
        super().put(_digest(path), filename + BESIDE, binary=False)
        return path


@contextlib.contextmanager
def whole_files():
    """Within this context Triton's cache is `WholeFiles`, unless somebody has chosen another."""
    if knobs.cache.manager_class is not None:
        yield
        return
    knobs.cache.manager_class = WholeFiles
    try:
        yield
    finally:
        del knobs.cache.manager_class


def _is_whole(path):
    try:
        return Path(path + BESIDE).read_text() == _digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
