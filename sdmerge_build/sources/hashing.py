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
from sdmerge_build.tensorfile import Header, Spec

__all__ = ["Digests", "Request", "learn_digests"]

CHUNK = 1 << 20  # bytes per read: small enough for the cache, large enough that Python's share of the time is small
SEGMENT = 128 << 20  # bytes per task where a file may be hashed in parallel

Part = tuple[list[TensorRow], dict[str, str]]
"""What one task learns: its tensors, and the file's own digests where one task reads all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What a file's bytes are known by; whole-file digests only where somebody asked."""

    tensors: str
    sha256: str | None = None
    blake3: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A file to be hashed, and which whole-file digests are wanted."""

    path: Path
    header: Header
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
    return Digests(tensors=tensor_digest(rows), **whole), snapshot


def _parts(request: Request) -> Iterator[list[Spec]]:
    """Split a file's tensors into tasks, in file order; one task when a whole-file digest needs every byte in order."""
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
        if whole:
            for chunk in _read(file, 0, request.header.data_start, buffer):
                for hasher in whole.values():
                    hasher.update(chunk)
        for spec in specs:
            content = blake3()
            for chunk in _read(file, request.header.data_start + spec.offset, spec.nbytes, buffer):
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
