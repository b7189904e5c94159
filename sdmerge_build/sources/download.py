"""Owns the download of one file: resumed wherever it was cut off, hashed while it is written, verified before anybody sees it.

Has never heard of hubs or recipes; it is given an address, and what the file must be. Content decides, whatever servers say meanwhile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

from sdmerge_build.files import boot_id
from sdmerge_build.sources.body import Body
from sdmerge_build.sources.hashing import FileDigest
from sdmerge_build.sources.sink import CHUNK, Sink
from sdmerge_build.sources.stock import Part
from sdmerge_build.sources.trust import PastEnd, Unsteady, WebError
from sdmerge_build.sources.web import DELAYS, Web

__all__ = ["Arrived", "Expected", "WrongFileError", "download"]

PROGRESS = 64 << 10  # bytes of one answer that count as a sign of life


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a file must be, as far as that is known; `sha256_wanted` asks to learn it."""

    size: int | None = None
    sha256: str | None = None
    blake3: str | None = None
    sha256_wanted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """What a whole file is known by; `tensors` is there for safetensors files."""

    size: int
    blake3: str
    sha256: str | None
    tensors: str | None


class WrongFileError(WebError):
    """The bytes are whole, and not the ones that are meant."""

    def __init__(self, what: str, arrived: Arrived) -> None:
        super().__init__(what)
        self.arrived = arrived


def download(web: Web, url: str, part: Part, expected: Expected, advanced: Callable[[int], None]) -> Arrived:
    """Download a file into `part`, going on with what is there. `advanced` hears of bytes, negative ones when some must be fetched again.

    Raises `WebError`, and `WrongFileError` when all of it came in one go and is not what was expected. When it returns, the file is on
    disk, or, where `boot_id` names the time since the system's start, will be there for as long as that lasts.
    """
    arrived, is_pieced = _attempt(web, url, part, expected, advanced)
    mistakes = _mistakes(expected, arrived)
    if mistakes and (is_pieced or _is_longer(web, url, arrived.size)):  # pieces of two files may have met; once more, from the first byte
        part.path.write_bytes(b"")
        advanced(-arrived.size)
        arrived, _ = _attempt(web, url, part, expected, advanced)
        mistakes = _mistakes(expected, arrived)
    if mistakes:
        part.remove()
        raise WrongFileError("; ".join(mistakes), arrived)
    return arrived


def _attempt(web: Web, url: str, part: Part, expected: Expected, advanced: Callable[[int], None]) -> tuple[Arrived, bool]:
    """Return what arrived, and whether it came in several pieces."""
    is_pieced = part.path.stat().st_size > 0
    with part.path.open("r+b", buffering=0) as file:
        arrived, was_pieced = _Attempt(web, url, part, expected, advanced, file).run()
        if not boot_id():  # where there is one, the memo vouches for the file only until the system stops, and it is hashed again after that
            os.fsync(file.fileno())
    return arrived, is_pieced or was_pieced


def _is_longer(web: Web, url: str, size: int) -> bool:
    """Ask a second time how long a file is that came in one piece and is the wrong one: an answer may have announced too little."""
    try:
        return web.read(url, 0, 1)[1] not in {None, size}
    except WebError:
        return False


def _mistakes(expected: Expected, arrived: Arrived) -> list[str]:
    pins = [(name, getattr(expected, name), getattr(arrived, name)) for name in ("size", "sha256", "blake3")]
    return [f"its {name} is {actual}, not {wanted}" for name, wanted, actual in pins if wanted is not None and wanted != actual]


class _Attempt:
    """One file from its first byte to its last, in as many answers as it takes."""

    def __init__(self, web: Web, url: str, part: Part, expected: Expected, advanced: Callable[[int], None], file: BinaryIO) -> None:
        self._web, self._url, self._part, self._expected, self._advanced, self._file = web, url, part, expected, advanced, file
        self._etag, noted = part.noted
        self._size = noted if expected.size is None else expected.size
        self._sink = Sink(file, self._digest())
        self._answers = 0
        self._best = 0  # bytes, the farthest this got
        self._other_total: int | None = None  # what the server said of the size, where that cannot be

    def run(self) -> tuple[Arrived, bool]:
        """Return what arrived, and whether it came in several pieces."""
        with ExitStack() as stack:
            stack.callback(lambda: self._sink.stop())  # noqa: PLW0108  whichever sink there is then
            self._take_up()
            failures = 0
            while not self._is_complete():
                try:
                    self._ask()
                except Unsteady as error:
                    failures = 0 if self._sink.position - self._best >= PROGRESS else failures + 1
                    self._best = max(self._best, self._sink.position)
                    if failures >= error.tries:
                        raise
                    if isinstance(error, PastEnd):
                        self._begin_anew()
                    if failures > 1 or error.delay:
                        self._web.wait(error.delay if error.delay is not None else DELAYS[failures - 1])
            blake3, sha256, tensors = self._sink.finish()
        size = self._sink.position
        return Arrived(size=size, blake3=blake3, sha256=sha256, tensors=tensors), self._answers > 1

    def _digest(self) -> FileDigest:
        return FileDigest(self._size, sha256=bool(self._expected.sha256) or self._expected.sha256_wanted)

    def _is_complete(self) -> bool:
        return self._size is not None and self._sink.position == self._size

    def _is_pinned(self) -> bool:
        return bool(self._expected.sha256 or self._expected.blake3)

    def _is_certain(self) -> bool:
        """Tell whether pieces of two files would be noticed: by the validator they come with, or by what the whole must be."""
        return bool(self._etag or self._is_pinned())

    def _take_up(self) -> None:
        """Hash what an earlier download left; longer than the file can be, it is worth nothing, nor is a whole that nobody vouches for today."""
        have = self._file.seek(0, 2)
        longest = math.inf if self._size is None else self._size if self._is_pinned() else self._size - 1
        if not have or have > longest or not self._is_certain():
            self._empty()
            self._sink.digest = self._digest()
            return
        self._file.seek(0)
        while data := self._file.read(CHUNK):
            self._sink.put(data, is_written=True)
        self._advanced(have)

    def _begin_anew(self) -> None:
        """Forget what came, and start with the first byte."""
        self._advanced(-self._sink.position)
        self._sink.stop()
        self._empty()
        self._sink = Sink(self._file, self._digest())

    def _empty(self) -> None:
        if self._file.seek(0, 2):  # ext4 writes a file that was truncated to the disk when it is closed; one that was empty need not wait for that
            self._file.truncate(0)
        self._file.seek(0)  # truncating leaves the position, and the next bytes would come after a hole
        self._etag, self._size = "", self._expected.size

    def _ask(self) -> None:
        """Ask for what is missing, and take what comes."""
        if self._sink.position and not self._is_certain():
            self._begin_anew()
        with self._web.stream(self._url, self._sink.position, etag=self._etag) as body:
            self._answers += 1
            self._agree(body)
            room = None if self._size is None else self._size - self._sink.position
            told = self._sink.position
            try:
                while room != 0 and (count := self._sink.receive(body.fill, room)):
                    if room is not None:
                        room -= count
                    if self._sink.position - told >= CHUNK:
                        self._advanced(self._sink.position - told)
                        told = self._sink.position
            finally:
                self._advanced(self._sink.position - told)
            if room == 0 and body.fill(memoryview(bytearray(1))):
                self._begin_anew()
                raise Unsteady("the server sends more than the file has")
            if body.total is None and self._size is None and self._sink.position:
                self._size = self._sink.position  # nobody said how long it is; the end was a proper one
            elif not self._is_complete():
                raise Unsteady("the server ended early")

    def _agree(self, body: Body) -> None:
        """Bring what the server sends together with what is here: another file, or another place in it, begins anew."""
        position, total = self._sink.position, body.total
        is_other = bool(self._etag and body.etag and body.etag != self._etag)
        is_other |= self._expected.size is None and None not in {total, self._size} and total != self._size
        if body.start != position and body.start:
            raise Unsteady("the server sends another part than was asked for")
        if (body.start != position or is_other) and position:
            self._begin_anew()
            if body.start:
                raise Unsteady("the file changed on its way")
        if self._expected.size is not None and total not in {None, self._expected.size}:
            what = f"the server offers a file of {total} bytes, not of {self._expected.size}"
            was, self._other_total = self._other_total, total
            raise WebError(what) if was == total else Unsteady(what)
        if total == 0:
            raise Unsteady("the server sends an empty file")
        if not self._sink.position:
            self._etag = body.etag
            self._part.note(body.etag, total)
            if self._expected.size is None:
                self._size = total
                self._sink.digest = self._digest()
        elif self._size is None:
            self._size = total
        if self._size is None and not body.is_bounded:
            raise WebError("the server does not say where the file ends, so that a lost connection would look like its end", "write its `size`")
