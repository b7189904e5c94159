"""Owns the files being written: regions go to their positions from any thread, digests are made in file order, data reaches the disk meanwhile.

Has never heard of torch, methods or what the bytes mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from blake3 import blake3

from sdmerge_build.digest import TensorRow, blake3_hex, tensor_digest
from sdmerge_build.files import allocate, flush_to_disk
from sdmerge_build.tensorfile import Layout, Spec

__all__ = ["Buffers", "Writer", "Written"]

FLUSH_SECONDS = 0.25

Region = tuple[int, int]
"""First byte's position in the data section, and length, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a finished file is known by."""

    size: int
    sha256: str
    header_size: int
    header_digest: str
    tensor_digest: str
    tensors: tuple[TensorRow, ...]


class Buffers:
    """Memory for one batch: for each file, the bytes of its region."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.views = [memoryview(bytearray(size)) for size in sizes]
        self.regions: Sequence[Region] = ()
        self.index = 0
        self.users = 0


class _File:
    """One file being written, and its digests as far as they have come."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.layout = layout
        self.data_start = len(layout.header)
        self.path = path
        self.handle = path.open("xb", buffering=0)
        self._sha256 = hashlib.sha256(layout.header)
        self._pending = list(reversed(layout.specs))
        self._hasher = blake3()
        self._hashed = 0  # bytes of the tensor at hand
        self._rows: list[TensorRow] = []
        self.arrivals: queue.SimpleQueue[Buffers | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Reserve the space and write the header."""
        allocate(self.handle, self.layout.size)
        write_at(self.handle, 0, memoryview(self.layout.header))

    def feed(self, data: memoryview) -> None:
        """Hash the next bytes of the file."""
        self._sha256.update(data)
        while data:
            spec = self._pending[-1]
            if not spec.nbytes:
                self._finish(spec)
                continue
            part = data[: spec.nbytes - self._hashed]
            self._hasher.update(part)
            self._hashed += len(part)
            data = data[len(part) :]
            if self._hashed == spec.nbytes:
                self._finish(spec)

    def _finish(self, spec: Spec) -> None:
        self._rows.append((spec.name, spec.dtype, spec.shape, self._hasher.hexdigest()))
        self._pending.pop()
        self._hasher, self._hashed = blake3(), 0

    def written(self) -> Written:
        """Return the digests, once every byte was fed."""
        while self._pending and not self._pending[-1].nbytes:
            self._finish(self._pending[-1])
        assert not self._pending, f"BUG: {self.path} was not hashed to its end"
        rows = tuple(self._rows)
        return Written(
            size=self.layout.size,
            sha256=self._sha256.hexdigest(),
            header_size=len(self.layout.header),
            header_digest=blake3_hex(self.layout.header),
            tensor_digest=tensor_digest(rows),
            tensors=rows,
        )


class Writer:
    """Writes several files at once, batch by batch.

    A worker takes `buffers`, fills them, calls `write` for each file and then `done`. Batches may be done in any order; one thread per file
    hashes them in theirs. Use as a context manager: leaving it ends the threads and closes the files, whatever happened.
    """

    def __init__(self, files: Sequence[tuple[Path, Layout]], buffer_sizes: Sequence[int], spare: int) -> None:
        self._files: list[_File] = []
        self._free: queue.SimpleQueue[Buffers | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._early: dict[int, Buffers] = {}
        self._next = 0
        self._stopping = threading.Event()
        self.failure: BaseException | None = None
        for path, layout in files:
            self._files.append(_File(path, layout))
        for _ in range(spare):
            self._free.put(Buffers(buffer_sizes))
        self._hashers = [threading.Thread(target=self._hash, args=(n,), daemon=True) for n in range(len(self._files))]
        self._flusher = threading.Thread(target=self._flush, daemon=True)

    def __enter__(self) -> Self:
        try:
            for file in self._files:
                file.start()
        except BaseException:
            self._close()
            raise
        for thread in (*self._hashers, self._flusher):
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        for file in self._files:
            file.arrivals.put(None)
        for thread in (*self._hashers, self._flusher):
            thread.join()
        self._close()

    def _close(self) -> None:
        for file in self._files:
            file.handle.close()

    def buffers(self) -> Buffers | None:
        """Wait for free buffers; None once the writer was told to stop."""
        buffers = self._free.get()
        if buffers is None:
            self._free.put(None)  # for the next who waits
        return buffers

    def stop(self, failure: BaseException | None = None) -> None:
        """Wake everyone who waits for buffers; nothing more will be written."""
        self.failure = self.failure or failure
        self._stopping.set()
        self._free.put(None)

    def write(self, handles: Sequence[BinaryIO], buffers: Buffers) -> None:
        """Write a batch's regions at their positions, through the calling thread's own handles."""
        for file, handle, view, (start, length) in zip(self._files, handles, buffers.views, buffers.regions, strict=True):
            write_at(handle, file.data_start + start, view[:length])

    def handles(self, stack: contextlib.ExitStack) -> list[BinaryIO]:
        """Open every file for one thread: positions belong to handles."""
        return [stack.enter_context(file.path.open("r+b", buffering=0)) for file in self._files]

    def done(self, buffers: Buffers) -> None:
        """Hand a written batch to the hashers, in order."""
        with self._lock:
            self._early[buffers.index] = buffers
            while batch := self._early.pop(self._next, None):
                self._next += 1
                batch.users = len(self._files)
                for file in self._files:
                    file.arrivals.put(batch)

    def finish(self) -> list[Written]:
        """Wait for the hashers, push the rest to disk, and return every file's digests."""
        for file in self._files:
            file.arrivals.put(None)
        for thread in self._hashers:
            thread.join()
        if self.failure:
            raise self.failure
        for file in self._files:
            flush_to_disk(file.handle)
        return [file.written() for file in self._files]

    def _hash(self, n: int) -> None:
        """Hash one file's regions as they come; the last file to be done with a batch frees it."""
        try:
            while batch := self._files[n].arrivals.get():
                self._files[n].feed(batch.views[n][: batch.regions[n][1]])
                with self._lock:
                    batch.users -= 1
                    if not batch.users:
                        self._free.put(batch)
        except BaseException as error:  # noqa: BLE001  it is raised by `finish`
            self.stop(error)

    def _flush(self) -> None:
        """Let write-back run while others compute, so that little is left at the end."""
        try:
            while not self._stopping.wait(FLUSH_SECONDS):
                for file in self._files:
                    flush_to_disk(file.handle)
        except BaseException as error:  # noqa: BLE001  a failed flush may lose data: never retried, raised by `finish`
            self.stop(error)


def write_at(handle: BinaryIO, position: int, data: memoryview) -> None:
    """Write all of `data` at a position; works alike on every system, as long as each thread has its own handle."""
    handle.seek(position)
    while data:
        data = data[handle.write(data) :]
