"""Owns what is done to files as files: replacing, publishing, positions, free space.

Has never heard of tensors, recipes or the store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sdmerge_build.errors import Issue, SpaceError

__all__ = [
    "Snapshot",
    "allocate",
    "as_space_error",
    "boot_id",
    "flush_to_disk",
    "free_space",
    "is_abandoned",
    "owner_tag",
    "place",
    "read_regular",
    "readable_size",
    "replacing",
    "sync_folder",
    "umask",
]

_FICLONE = 0x40049409  # Linux: share extents between two files (btrfs, xfs, bcachefs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What the file system says of a file without reading it. Equal snapshots save a re-hash; they never prove content."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Take a snapshot; follows links, and raises `OSError` as `stat` does."""
        stat = path.stat()
        return cls(size=stat.st_size, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns, inode=stat.st_ino)


def read_regular(path: Path, limit: int = 64 << 20) -> bytes:
    """Read a small file whole. Anything else that lies there (a pipe would wait for ever) and anything larger raises `OSError`."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:  # noqa: PTH123  a handle has no path
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError(errno.EINVAL, "not a regular file, or too large", str(path))
        return file.read()


def boot_id() -> str:
    """Name the time since the system started; nothing where the system has no name for it.

    What was written in this time is there as long as it lasts, on disk or not: only a crash of the whole system loses it.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def owner_tag() -> str:
    """Make a unique name, HOST-PID-UUID, that says which process a temporary file belongs to."""
    return f"{_host()}-{os.getpid()}-{uuid.uuid4().hex}"


def is_abandoned(tag: str) -> bool:
    """Tell whether what has this name belonged to a process of this machine that is gone; false for names that are no tag."""
    host, _, pid = tag.rpartition("-")[0].rpartition("-")
    return host == _host() and re.fullmatch("[0-9]{1,9}", pid) is not None and not _is_running(int(pid))


def _host() -> str:
    return platform.node().replace("-", "_") or "host"


def _is_running(pid: int) -> bool:
    """Tell whether a process of this machine lives. Where asking would end it (Windows), open files protect themselves from removal."""
    if os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def umask() -> int:
    """Return the process's umask; the only portable way is to set it and set it back."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def replacing(path: Path, *, is_lasting: bool = True) -> Iterator[BinaryIO]:
    """Write beside `path`, then rename over it: readers see the old file or the new one.

    What is not `lasting` may be gone after a crash of the system; then nothing waits for the disk, which would have to write all that is pending.
    """
    part = path.with_name(f".{path.name[:64]}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:  # not tempfile: it makes files that only their owner can read
            yield file
            file.flush()
            if is_lasting:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the system knows how."""
    if os.name == "nt":
        return  # folders cannot be opened there; NTFS journals renames itself
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def allocate(file: BinaryIO, size: int) -> None:
    """Reserve `size` bytes on disk before the first is written, so that a full disk is noticed at once."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
    file.truncate(size)  # a file system that cannot reserve; the check before had to do


def flush_to_disk(file: BinaryIO) -> None:
    """Push a file's data to disk, without its timestamps where the system can tell them apart."""
    getattr(os, "fdatasync", os.fsync)(file.fileno())


def place(stored: Path, target: Path) -> str:
    """Put a stored file at `target` by one rename, and say how: `reflink`, `hard link` or `copy`.

    A hard link shares the stored file's read-only mode; a reflink or a copy is the user's own, and its mode follows the umask.
    """
    part = target.with_name(f".{target.name[:64]}.{uuid.uuid4().hex}.part")
    try:
        how = _duplicate(stored, part)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
    return how


def _duplicate(stored: Path, part: Path) -> str:
    """Make `part` the same bytes as `stored`, in the cheapest way the file system has."""
    if _reflink(stored, part):
        return "reflink"
    try:
        os.link(stored, part)
    except OSError:
        with stored.open("rb") as source, part.open("xb") as copy:
            shutil.copyfileobj(source, copy, 4 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        return "copy"
    return "hard link"


def _reflink(stored: Path, part: Path) -> bool:
    """Clone `stored` by sharing its extents; false where the file system cannot."""
    try:
        import fcntl  # noqa: PLC0415  Windows has none
    except ImportError:
        return False
    try:
        with stored.open("rb") as source, part.open("xb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())
            os.fsync(copy.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        return False
    return True


def free_space(folder: Path) -> int:
    """Return the bytes that may still be written below `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def readable_size(nbytes: float) -> str:
    """Write a number of bytes for people.

    >>> readable_size(2132625462), readable_size(811)
    ('2.13 GB', '811 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


@contextlib.contextmanager
def as_space_error(folder: Path, needed: int) -> Iterator[None]:
    """Turn "no space left" while writing `needed` bytes below `folder` into an error that says the numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        what = f"no space left: {readable_size(needed)} are needed, {readable_size(free_space(folder))} are free"
        if error.errno == errno.EFBIG:
            what = f"a file is larger than this system allows; {readable_size(needed)} are needed in all"
        issue = Issue(where=str(folder), what=what, hint="free some space, or use another disk with --store and --out")
        raise SpaceError(issue) from error
