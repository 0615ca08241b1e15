"""Requests that end in time however slowly a server sends: headers byte by byte, or `100 Continue` for ever.

A socket's own timeout is of each read alone, and starts anew with every byte.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

from urllib3 import HTTPConnectionPool, connection_from_url
from urllib3.connection import HTTPConnection, HTTPSConnection

AGAIN = 0.1  # seconds until a connection is shut down again, which may not have had a socket yet
_present = threading.local()  # the deadline of the request that a thread makes


class Deadline:
    """Shuts down the connection by which this thread makes a request `seconds` after it began. A context.

    passed: whether it has. connection: the one, as soon as it is known.
    """

    def __init__(self, seconds: float):
        self.passed = False
        self.connection: HTTPConnection | None = None
        self._seconds, self._met, self._changing = seconds, threading.Event(), threading.Lock()

    def __enter__(self) -> Deadline:
        _present.deadline = self
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.met()

    def met(self) -> bool:
        """Whether the answer has come in time; the connection is then not touched any more."""
        with self._changing:
            self._met.set()
        return not self.passed

    def _watch(self) -> None:
        seconds = self._seconds
        while not self._met.wait(seconds):
            with self._changing:
                if self._met.is_set():
                    return
                self.passed, seconds = True, AGAIN
                self._shut_down()

    def _shut_down(self) -> None:
        found = self.connection and self.connection.sock
        if isinstance(found, socket.socket):
            with suppress(OSError):
                # not the method of a TLS socket, which would leave the thread that reads without its state
                socket.socket.shutdown(found, socket.SHUT_RDWR)


class _Held(HTTPConnection):
    def request(self, *arguments: Any, **settings: Any) -> None:
        _present.deadline.connection = self
        super().request(*arguments, **settings)


class _HeldByTLS(_Held, HTTPSConnection):
    pass


def pool_of(url: str, connections: int) -> HTTPConnectionPool:
    """Connections to a server, for requests within a `Deadline`."""
    pool = connection_from_url(url, maxsize=connections)
    pool.ConnectionCls = _HeldByTLS if pool.scheme == "https" else _Held
    return pool
