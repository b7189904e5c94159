"""Owns the way of downloaded bytes to the disk and into digests, on threads of its own, through a few buffers that are used again and again.

Has never heard of where bytes come from. Fresh memory for every piece would cost as much as hashing it: each page of it is a page fault.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import BinaryIO

from sdmerge_build.sources.hashing import FileDigest

__all__ = ["CHUNK", "Sink"]

CHUNK = 1 << 20  # bytes written and hashed at once
BUFFERS = 16


class _Piece:
    """A buffer on its way: how much of it counts, and who still needs it."""

    def __init__(self, buffer: bytearray, length: int, users: int, *, is_written: bool) -> None:
        self.buffer, self.length, self.users, self.is_written = buffer, length, users, is_written


class Sink:
    """Writes and hashes what comes; raises in the giver's thread what went wrong there. `position` counts what was given."""

    def __init__(self, file: BinaryIO, digest: FileDigest) -> None:
        self._file = file
        self.digest = digest
        self.position = 0
        self._failure: BaseException | None = None
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._made = 0  # buffers, of BUFFERS at most: a small file needs few
        self._buffer, self._held = self._room(), 0
        self._lock = threading.Lock()
        works = [self._write, self._feed, self._feed_sha256] if digest.wants_sha256 else [self._write, self._feed]
        self._lanes: list[queue.SimpleQueue[_Piece | None]] = [queue.SimpleQueue() for _ in works]
        self._threads = [threading.Thread(target=self._work, args=pair, daemon=True) for pair in zip(self._lanes, works, strict=True)]
        for thread in self._threads:
            thread.start()

    def put(self, data: bytes, *, is_written: bool = False) -> None:
        """Hand over the next bytes of the file; `is_written` for those that lie there already."""
        view = memoryview(data)
        while view:
            piece = view[: CHUNK - self._held]
            self._buffer[self._held : self._held + len(piece)] = piece
            self._held += len(piece)
            view = view[len(piece) :]
            if self._held == CHUNK or is_written:
                self._pass_on(is_written=is_written)
        self.position += len(data)

    def receive(self, fill: Callable[[memoryview], int], most: int | None) -> int:
        """Let `fill` put the next bytes, `most` of them, where they are needed, and return how many there were; nothing is the end."""
        room = memoryview(self._buffer)[self._held :]
        count = fill(room if most is None else room[:most])
        self._held += count
        self.position += count
        if self._held == CHUNK:
            self._pass_on(is_written=False)
        return count

    def stop(self) -> None:
        """Let what was handed over be written, and end the threads; what went wrong is for `finish` to raise."""
        if self._held and self._failure is None:
            self._hand_over(is_written=False)
            self._held = 0
        for lane, thread in zip(self._lanes, self._threads, strict=True):
            if thread.is_alive():
                lane.put(None)
        for thread in self._threads:
            thread.join()

    def finish(self) -> tuple[str, str | None, str | None]:
        """Return blake3, sha256 and the tensors' digest, once everything is written."""
        self.stop()
        if self._failure:
            raise self._failure
        return self.digest.finish()

    def _pass_on(self, *, is_written: bool) -> None:
        self._hand_over(is_written=is_written)
        self._buffer, self._held = self._room(), 0
        if self._failure:
            raise self._failure

    def _hand_over(self, *, is_written: bool) -> None:
        piece = _Piece(self._buffer, self._held, len(self._lanes), is_written=is_written)
        for lane in self._lanes:
            lane.put(piece)

    def _room(self) -> bytearray:
        """Return a buffer that nobody needs any more; wait for one when there are enough."""
        if self._made < BUFFERS and self._free.empty():
            self._made += 1
            return bytearray(CHUNK)
        return self._free.get()

    def _work(self, lane: queue.SimpleQueue[_Piece | None], work: Callable[[memoryview, _Piece], None]) -> None:
        while piece := lane.get():
            try:
                if self._failure is None:  # otherwise only give buffers back, so that the giver does not wait for ever
                    work(memoryview(piece.buffer)[: piece.length], piece)
            except BaseException as error:  # noqa: BLE001  raised where bytes are handed over
                self._failure = error
            with self._lock:
                piece.users -= 1
                if not piece.users:
                    self._free.put(piece.buffer)

    def _write(self, view: memoryview, piece: _Piece) -> None:
        while view and not piece.is_written:
            view = view[self._file.write(view) :]

    def _feed(self, view: memoryview, _piece: _Piece) -> None:
        self.digest.feed(view)

    def _feed_sha256(self, view: memoryview, _piece: _Piece) -> None:
        self.digest.feed_sha256(view)
