"""Owns folders of models: which model files lie below them, by name and by size.

Has never heard of recipes, nor of what is in a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["SUFFIXES", "Index"]

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class Index:
    """The model files below some folders; looked through once, and only when a source needs it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._files: list[Path] | None = None

    def all(self) -> list[Path]:
        """List every model file, in an order that does not depend on the file system."""
        if self._files is None:
            self._files = [path for folder in self._folders for path in _walk(folder)]
        return self._files

    def named(self, filename: str) -> list[Path]:
        """List the files of a name; upper and lower case do not count, as on Windows and macOS."""
        return [path for path in self.all() if path.name.casefold() == filename.casefold()]

    def sized(self, size: int) -> list[Path]:
        """List the files of a size in bytes."""
        return [path for path in self.all() if path.stat().st_size == size]


def _walk(folder: Path) -> Iterator[Path]:
    """Walk a folder, links included, each real folder once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (path for name in sorted(files) if name.lower().endswith(SUFFIXES) and (path := Path(root, name)).is_file())
