"""Owns the body of one answer: bytes into whoever's memory, straight off the connection where its length is known.

Has never heard of addresses or files. httpx, by way of h11, copies each byte some four times; a checkpoint has seconds' worth of them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sdmerge_build.sources.trust import Unsteady, WebError

__all__ = ["READ_SECONDS", "Body", "Flow"]

READ_SECONDS = 30.0  # of silence between two bytes
STALLED_SECONDS, STALLED_BYTES = 60.0, 64 << 10  # slower than this is as good as dead
PIECE = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A file, or the rest of one, on its way: its first byte's position, and what the server says of the whole."""

    start: int
    total: int | None  # bytes of the whole file
    etag: str  # a strong validator, or nothing
    is_bounded: bool  # a lost connection does not look like the end
    fill: Callable[[memoryview], int]  # puts the next bytes into memory, and returns how many; nothing is the end

    def pieces(self) -> Iterator[bytes]:
        """Yield what comes, for those who want little of it."""
        memory = memoryview(bytearray(PIECE))
        while count := self.fill(memory):
            yield bytes(memory[:count])


class Flow:
    """Takes what came with the headers from httpx, and the rest of `length` bytes off `connection`; without one, everything from httpx.

    h11 gives all that it holds at once, so that after its first piece it holds nothing. Raises `Unsteady` when a server has all but
    stopped sending, and `WebError` when everything is being stopped.
    """

    def __init__(self, pieces: Iterator[bytes], connection: socket.socket | None, length: int, stopping: threading.Event, host: str) -> None:
        self._pieces, self._connection, self._left, self._stopping, self._host = pieces, connection, length, stopping, host
        self._held = memoryview(b"")
        self._is_begun = False
        self._since, self._have = time.monotonic(), 0

    def __call__(self, memory: memoryview) -> int:
        """Put the next bytes into `memory`, and return how many there were; nothing is the end."""
        if self._stopping.is_set():
            raise WebError("stopped")
        if not self._held and not (self._is_begun and self._connection):
            self._held = memoryview(next(self._pieces, b""))
            self._is_begun = True
        if self._held:
            count = min(len(memory), len(self._held))
            memory[:count], self._held = self._held[:count], self._held[count:]
        else:
            count = self._received(memory)
        self._left -= count
        self._watch(count)
        return count

    def _received(self, memory: memoryview) -> int:
        if self._connection is None or self._left <= 0:
            return 0
        self._connection.settimeout(READ_SECONDS)
        try:
            count = self._connection.recv_into(memory, min(len(memory), self._left))
        except OSError:
            count = 0
        if not count:
            raise Unsteady(f"the connection to {self._host} was lost")
        return count

    def _watch(self, count: int) -> None:
        self._have += count
        if self._have >= STALLED_BYTES:
            self._since, self._have = time.monotonic(), 0
        elif count and time.monotonic() - self._since > STALLED_SECONDS:
            raise Unsteady("the server has all but stopped sending")
