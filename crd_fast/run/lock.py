"""One process at a time writes to a run's folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from crd_fast.errors import UserError

LOCK = "run.lock"

logger = logging.getLogger("crd_fast")


class RunLock:
    """Held from here to `close`, or to the end of the process, however it ends.

    The operating system holds it for the process, not for its children and not for the file, which stays.
    Raises UserError where another process has it, or nothing can be written in the folder.
    """

    def __init__(self, run: Path):
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._file = open(run / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  open as long as it is held
        except OSError as error:
            raise UserError(f"{run}: cannot be written to: {error.strerror}") from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                logger.warning("warning: %s: cannot be locked: %s", run / LOCK, error.strerror)
                return
            self._file.seek(0)
            holder = self._file.read(200).strip() or "another process"
            self._file.close()
            raise UserError(f"{run}: {holder} is writing to this run") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
