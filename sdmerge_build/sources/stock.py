"""Owns the source files that the store keeps: downloads on their way, finished ones, and what was converted from other formats.

Has never heard of recipes or the network. Files are named by content and appear by one rename; `rm -rf` of any of them is harmless.

    cache/sources/ab/ab12….safetensors      a downloaded file, by its blake3
    cache/sources/ab/ab12….KIND.safetensors a safetensors file made of something else, by the digest of what it was made of
                     ….KIND.tensors         the digest of the tensors it was made with
    cache/downloads/KEY.HOST-PID-….part     a download on its way, with its validator in .json; whoever dies leaves it to be taken over
    cache/downloads/KEY.HOST-PID-….bundle/  the files of a checkpoint that will be put together
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from sdmerge_build.digest import blake3_hex
from sdmerge_build.files import boot_id, is_abandoned, owner_tag, read_regular, replacing, sync_folder, umask

__all__ = ["Part", "Stock"]

_RELEASED = "released"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A download's file, ours alone, and what is noted of it: validator and size of the file it is a part of."""

    path: Path

    @property
    def _note(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def noted(self) -> tuple[str, int | None]:
        """Return the validator that the bytes so far came with, and the size of the whole; nothing where that is not known or cannot be read."""
        try:
            table: Any = json.loads(read_regular(self._note, 10_000))
            etag, size = table["etag"], table["size"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "", None
        is_sound = isinstance(etag, str) and etag.isascii() and etag.isprintable()
        return etag if is_sound else "", size if type(size) is int and size > 0 else None

    def note(self, etag: str, size: int | None) -> None:
        """Note validator and size, before the first byte that came with them is written."""
        self._note.write_text(json.dumps({"etag": etag, "size": size}), encoding="utf-8")

    def remove(self) -> None:
        """Remove what was downloaded."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


class Stock:
    """The source files of one store."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "sources"
        self._downloads = root / "downloads"

    def place_of(self, digest: str, suffix: str) -> Path:
        """Say where a file of this digest lies, if it is here."""
        return self.folder / digest[:2] / f"{digest}{suffix}"

    def keep(self, file: Path, digest: str, suffix: str) -> Path:
        """Move a finished file to its place by one rename."""
        place = self.place_of(digest, suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        self.settle(file, place)
        return place

    @staticmethod
    def settle(file: Path, place: Path) -> None:
        """Give a finished file its name; where another process was first with the same bytes, its file is the one that stays."""
        if _is_same(file, place):
            file.unlink()
            return
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        file.chmod(0o444 & ~umask())
        file.replace(place)
        if not boot_id():  # as for the file itself: see `download`
            sync_folder(place.parent)

    @staticmethod
    def vouches(made: Path, tensors: str) -> bool:
        """Tell whether a converted file still has the tensors it had when it was made; noted beside it the first time it is asked."""
        note = made.with_suffix(".tensors")
        try:
            return read_regular(note, 1000).decode() == tensors
        except FileNotFoundError:
            with replacing(note, is_lasting=False) as file:
                file.write(tensors.encode())
            return True
        except (OSError, ValueError):
            return False

    @staticmethod
    def discard(made: Path) -> None:
        """Remove a converted file that is damaged, whatever lies there."""
        for path in (made, made.with_suffix(".tensors")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what conversions of this machine left half made when they were killed."""
        for path in self.folder.glob("*/.*.making"):
            if is_abandoned(path.name.removeprefix(".").removesuffix(".making")):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def part(self, *identity: str | None) -> Iterator[Part]:
        """Provide the part of a download: one that a dead process left, or an empty one. What is left afterwards waits for the next.

        Taking over is one rename, so of two processes one gets it. Two who download the same at once do not meet.
        """
        self._downloads.mkdir(parents=True, exist_ok=True)
        key = blake3_hex(repr(identity).encode())[:32]
        part = Part(path=self._downloads / f"{key}.{owner_tag()}.part")
        if orphans := sorted(self._orphans(key), key=_size, reverse=True):
            with contextlib.suppress(OSError):
                orphans[0].with_suffix(".json").replace(part.path.with_suffix(".json"))
            with contextlib.suppress(OSError):
                orphans[0].replace(part.path)
            for other in orphans[1:]:
                Part(path=other).remove()
        part.path.touch()
        try:
            yield part
        finally:
            if _size(part.path) > 0:
                left = part.path.with_name(f"{key}.{_RELEASED}-{os.getpid()}.part")
                with contextlib.suppress(OSError):
                    part.path.with_suffix(".json").replace(left.with_suffix(".json"))
                part.path.replace(left)
            part.remove()

    def bundle(self, *identity: str) -> Path:
        """Provide a folder for the files of one checkpoint: one that a dead process left, or an empty one."""
        self._downloads.mkdir(parents=True, exist_ok=True)
        key = blake3_hex(repr(identity).encode())[:32]
        folder = self._downloads / f"{key}.{owner_tag()}.bundle"
        for left in self._downloads.glob(f"{key}.*.bundle"):
            if is_abandoned(left.name.removeprefix(f"{key}.").removesuffix(".bundle")) and left.is_dir() and not left.is_symlink():
                with contextlib.suppress(OSError):
                    left.rename(folder)
                    return folder
        folder.mkdir()
        return folder

    @staticmethod
    def holds(file: Path, sha256: str | None) -> bool:
        """Tell whether a file of a bundle is there and is the one with this sha256; without one, nobody knows."""
        if not sha256 or not _is_plain(file):
            return False
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == sha256

    @staticmethod
    def give_out(file: Path, target: Path) -> None:
        """Move a finished file into a bundle, by one rename."""
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)

    def drop_bundle(self, folder: Path) -> bool:
        """Remove a bundle that was put together, and tell whether it was one; any other folder is left alone."""
        is_bundle = folder.suffix == ".bundle" and folder.parent.resolve() == self._downloads.resolve()
        if is_bundle:
            shutil.rmtree(folder, ignore_errors=True)
        return is_bundle

    def _orphans(self, key: str) -> Iterator[Path]:
        for path in self._downloads.glob(f"{key}.*.part"):
            tag = path.name.removeprefix(f"{key}.").removesuffix(".part")
            is_free = tag.startswith(_RELEASED) or is_abandoned(tag)
            if is_free and _is_plain(path) and not path.with_suffix(".json").is_symlink():
                yield path


def _is_plain(path: Path) -> bool:
    """Tell whether a regular file lies there; a link could lead anywhere."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _is_same(file: Path, place: Path) -> bool:
    """Tell whether two files hold the same bytes; they are read only when they are of one size."""
    if not _is_plain(place) or file.stat().st_size != place.stat().st_size:
        return False
    hashers = [blake3(), blake3()]
    for path, hasher in zip((file, place), hashers, strict=True):
        with path.open("rb") as content:
            while data := content.read(1 << 20):
                hasher.update(data)
    return hashers[0].digest() == hashers[1].digest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
