"""Which connections a server has, how far each is, and which of them has to go when there are too many."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["waiting", "receiving", "working", "replying"]
SETTLED = 0.25  # seconds that a connection is left alone before another may take its place


@dataclass
class _Connection:
    phase: Phase
    since: float
    until: float | None


@dataclass
class Connections:
    """The open connections of a server, at most `most` of them.

    One that is waited for longer than its phase may take is closed, and so is the one that was waited for longest when
    another needs its place: whoever connects and says nothing keeps nobody out.
    """

    most: int
    _open: dict[socket.socket, _Connection] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: socket.socket, patience: float) -> bool:
        """Take in a connection, if need be in place of another; False if all of them are at work."""
        now = time.monotonic()
        with self._lock:
            if len(self._open) >= self.most and not self._make_room(now):
                return False
            self._open[connection] = _Connection("waiting", now, now + patience)
            return True

    def enter(self, connection: socket.socket, phase: Phase, patience: float | None = None) -> None:
        """Note a connection's next phase, and how many seconds it may take; None is as long as it takes."""
        now = time.monotonic()
        with self._lock:
            if connection in self._open:
                self._open[connection] = _Connection(phase, now, None if patience is None else now + patience)

    def leave(self, connection: socket.socket) -> None:
        """Forget a connection that is closed."""
        with self._lock:
            self._open.pop(connection, None)

    def expire(self) -> None:
        """Close the connections whose time is over."""
        now = time.monotonic()
        with self._lock:
            for late in [c for c, state in self._open.items() if state.until is not None and now > state.until]:
                self._close(late)

    def _make_room(self, now: float) -> bool:
        """Close the connection that was waited for longest; those that have sent nothing yet come first."""
        idle = [(s.phase != "waiting", s.since, c) for c, s in self._open.items() if s.until is not None]
        idle = [entry for entry in idle if now - entry[1] > SETTLED]
        if not idle:
            return False
        self._close(min(idle, key=lambda entry: entry[:2])[2])
        return True

    def _close(self, connection: socket.socket) -> None:
        del self._open[connection]
        with suppress(OSError):  # the other side may have been faster
            connection.shutdown(socket.SHUT_RDWR)  # its thread meets the end of what it reads, and goes
