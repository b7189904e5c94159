"""Owns the one read that learns all of a file's digests: its tensors' blake3, and its sha256 and blake3 where they are pinned.

Has never heard of recipes; it is given files and says what they hold.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from sdmerge_build.digest import TensorRow, tensor_digest
from sdmerge_build.errors import IntegrityError, Issue
from sdmerge_build.files import Snapshot
from sdmerge_build.tensorfile import Header, Spec, header_length, parse_header

__all__ = ["Digests", "FileDigest", "Request", "learn_digests"]

CHUNK = 1 << 20  # bytes per read: small enough for the cache, large enough that Python's share of the time is small
SEGMENT = 128 << 20  # bytes per task where a file may be hashed in parallel

Part = tuple[list[TensorRow], dict[str, str]]
"""What one task learns: its tensors, and the file's own digests where one task reads all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What a file's bytes are known by; whole-file digests only where somebody asked."""

    tensors: str  # nothing, where the file is no safetensors file
    sha256: str | None = None
    blake3: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A file to be hashed, and which whole-file digests are wanted."""

    path: Path
    header: Header | None  # of a safetensors file; any other file is hashed as a whole, and has no tensors
    sha256: bool = False
    blake3: bool = False


def learn_digests(requests: Sequence[Request], jobs: int, advanced: Callable[[int], None]) -> list[tuple[Digests, Snapshot]]:
    """Read each file once, on `jobs` threads, and return its digests with the snapshot they hold for.

    Raises `IntegrityError` when a file changes while it is read.
    """
    before = [Snapshot.of(request.path) for request in requests]
    stopping = threading.Event()

    def hash_part(request: Request, specs: list[Spec]) -> Part:
        return _hash_part(request, specs, advanced, stopping)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            parts = [[pool.submit(hash_part, request, specs) for specs in _parts(request)] for request in requests]
            return [_learned(*item) for item in zip(requests, before, parts, strict=True)]
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _learned(request: Request, snapshot: Snapshot, parts: Sequence[Future[Part]]) -> tuple[Digests, Snapshot]:
    """Put a file's parts together, once they are hashed."""
    rows: list[TensorRow] = []
    whole: dict[str, str] = {}
    for part in parts:
        part_rows, whole = part.result()
        rows += part_rows
    if Snapshot.of(request.path) != snapshot:
        raise IntegrityError(Issue(where=str(request.path), what="the file changed while it was being read"))
    return Digests(tensors=tensor_digest(rows) if request.header else "", **whole), snapshot


def _parts(request: Request) -> Iterator[list[Spec]]:
    """Split a file's tensors into tasks, in file order; one task when a whole-file digest needs every byte in order."""
    if request.header is None:
        yield []
        return
    specs = sorted(request.header.tensors.values(), key=lambda spec: (spec.offset, spec.nbytes))
    if request.sha256 or request.blake3:
        yield specs
        return
    part: list[Spec] = []
    for spec in specs:
        part.append(spec)
        if spec.offset + spec.nbytes - part[0].offset >= SEGMENT:
            yield part
            part = []
    if part:
        yield part


def _hash_part(request: Request, specs: list[Spec], advanced: Callable[[int], None], stopping: threading.Event) -> Part:
    """Hash consecutive tensors of a file, and the file's own digests where wanted."""
    whole: dict[str, Any] = {}
    if request.sha256:
        whole["sha256"] = hashlib.sha256()
    if request.blake3:
        whole["blake3"] = blake3()
    rows: list[TensorRow] = []
    buffer = memoryview(bytearray(CHUNK))
    with request.path.open("rb", buffering=0) as file:
        data_start = request.header.data_start if request.header else file.seek(0, 2)
        if whole:
            for chunk in _read(file, 0, data_start, buffer):
                for hasher in whole.values():
                    hasher.update(chunk)
                if stopping.is_set():
                    break
                if request.header is None:
                    advanced(len(chunk))
        for spec in specs:
            content = blake3()
            for chunk in _read(file, data_start + spec.offset, spec.nbytes, buffer):
                content.update(chunk)
                for hasher in whole.values():
                    hasher.update(chunk)
            if stopping.is_set():
                break
            rows.append((spec.name, spec.dtype, spec.shape, content.hexdigest()))
            advanced(spec.nbytes)
    return rows, {name: hasher.hexdigest() for name, hasher in whole.items()}


def _read(file: BinaryIO, start: int, length: int, buffer: memoryview) -> Iterator[memoryview]:
    file.seek(start)
    while length:
        count = file.readinto(buffer[: min(length, len(buffer))])  # type: ignore[attr-defined]  # raw files have it
        if not count:
            raise IntegrityError(Issue(where=str(file.name), what="the file became shorter while it was being read"))
        yield buffer[:count]
        length -= count


class FileDigest:
    """Hashes a file that arrives front to back: the whole of it, and, once its header is known, its tensors.

    `size` is the file's size in bytes where that is known beforehand; without it a header cannot be checked, and tensors are not hashed.
    """

    def __init__(self, size: int | None, *, sha256: bool) -> None:
        self._size = size
        self._whole = blake3()
        self._sha256 = hashlib.sha256() if sha256 else None
        self._start = bytearray()  # what came before the header was whole
        self._specs: list[Spec] | None = None  # still to come, last first; None until the header is known
        self._rows: list[TensorRow] = []
        self._content, self._have = blake3(), 0
        self._has_tensors = size is not None and size >= 16
        self.received = 0

    @property
    def wants_sha256(self) -> bool:
        """Tell whether somebody must feed the sha256."""
        return self._sha256 is not None

    def feed(self, data: bytes | memoryview) -> None:
        """Hash the next bytes of the file; the sha256 is fed by `feed_sha256`, so that another thread may do it."""
        self._whole.update(data)
        self.received += len(data)
        if not self._has_tensors:
            return
        if self._specs is None:
            self._start += data
            self._find_header()
        else:
            self._feed_tensors(memoryview(data))

    def feed_sha256(self, data: bytes | memoryview) -> None:
        """Hash the next bytes of the file for its sha256, where that is wanted."""
        if self._sha256:
            self._sha256.update(data)

    def finish(self) -> tuple[str, str | None, str | None]:
        """Return blake3, sha256 where wanted, and the tensors' digest where the file is a safetensors file."""
        if self._specs:
            self._feed_tensors(memoryview(b""))  # tensors without elements at the end
        is_whole = self._specs is not None and not self._specs
        return self._whole.hexdigest(), self._sha256.hexdigest() if self._sha256 else None, tensor_digest(self._rows) if is_whole else None

    def _find_header(self) -> None:
        """Read the header as soon as all of it is here; a file without one has no tensors to hash."""
        if len(self._start) < 16:
            return
        try:
            length = header_length(bytes(self._start[:16]), self._size or 0, "")
            if len(self._start) < 8 + length:
                return
            header = parse_header(bytes(self._start[8 : 8 + length]), self._size or 0, "")
        except IntegrityError:
            self._has_tensors = False
            self._start = bytearray()
            return
        rest, self._start = bytes(self._start[header.data_start :]), bytearray()
        self._specs = sorted(header.tensors.values(), key=lambda spec: (spec.offset, spec.nbytes), reverse=True)
        self._feed_tensors(memoryview(rest))

    def _feed_tensors(self, data: memoryview) -> None:
        while self._specs:
            spec = self._specs[-1]
            piece = data[: spec.nbytes - self._have]
            self._content.update(piece)
            self._have += len(piece)
            data = data[len(piece) :]
            if self._have < spec.nbytes:
                return
            self._rows.append((spec.name, spec.dtype, spec.shape, self._content.hexdigest()))
            self._specs.pop()
            self._content, self._have = blake3(), 0
