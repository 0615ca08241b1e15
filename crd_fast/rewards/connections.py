"""Connections of the reward server: who may hold one, and how long without asking anything.

uvicorn waits for the head of a request as long as it takes. Here it has to come within `HEAD_SECONDS`, and
where there are too many connections, all together or of one client, the one that has waited longest without
a request at work is closed, so that whoever does ask is answered.
"""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

from crd_fast.errors import UserError
from crd_fast.rewards.foreign import is_loopback

MAX_CONNECTIONS = 256
MAX_OF_A_CLIENT = 128
HEAD_SECONDS = 10.0


class Connection(H11Protocol):
    """One client's connection. It waits, or a request of it is at work."""

    _since = 0.0
    _head_timer: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """Whether no request is at work: none has come yet, or the last one is answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._expect_head()
        host = self.client[0] if self.client else None
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self]
        of_client = [other for other in others if other.client and other.client[0] == host]
        for found, most in ((of_client, MAX_OF_A_CLIENT), (others, MAX_CONNECTIONS)):
            if len(found) >= most:
                waiting = [other for other in found if other.waits]
                min(waiting, key=lambda other: other._since, default=self).drop()
                return

    def data_received(self, data: bytes) -> None:
        if self.waits and self._head_timer is None:
            self._expect_head()
        super().data_received(data)
        if not self.waits:
            self._forget_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def drop(self) -> None:
        self._forget_head()
        self.connections.discard(self)  # at once: the next connection counts them
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.drop)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A listening socket. Raises UserError where the port is taken, or where others would need no token."""
    if token is None and not is_loopback(host):
        raise UserError(f"--host {host}: expected a token (see --token-env) where other machines can connect")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from None
    return listening
