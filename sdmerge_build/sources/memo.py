"""Owns the memory of what files hold: (path, size, times, inode) → digests, so that nothing is hashed twice.

Has never heard of recipes. It saves work and never decides: without it every answer is the same, only later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from sdmerge_build.digest import is_hex
from sdmerge_build.files import Snapshot, boot_id, read_regular, replacing
from sdmerge_build.sources.hashing import Digests

__all__ = ["Memo"]

VERSION = 1


class Memo:
    """The memo of one store; unreadable or foreign content is forgotten, not an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = self._load()
        self._learned: dict[str, dict[str, Any]] = {}

    def recall(self, path: Path, snapshot: Snapshot | None = None) -> Digests | None:
        """Return what is known of a file that has not changed since; `snapshot` is how it was seen, when not now."""
        try:
            entry = self._entries[str(path.resolve())]
            if entry["snapshot"] != dataclasses.asdict(snapshot or Snapshot.of(path)) or entry.get("boot", "") not in {"", boot_id()}:
                return None
            digests = Digests(**entry["digests"])
        except (KeyError, TypeError, OSError):
            return None
        sound = (digests.tensors == "" or is_hex(digests.tensors)) and all(
            value is None or is_hex(value) for value in (digests.sha256, digests.blake3)
        )
        return digests if sound else None

    def remember(self, path: Path, digests: Digests, snapshot: Snapshot, boot: str = "") -> None:
        """Remember what a file holds; whole-file digests learned earlier of the same bytes are kept.

        A file that is not known to be on disk is vouched for until the system stops: `boot` names that time. Reading it again does not put it there.
        """
        earlier = self.recall(path)
        if earlier and not boot:
            boot = self._entries[str(path.resolve())].get("boot", "")
        if earlier and earlier.tensors == digests.tensors:
            digests = dataclasses.replace(digests, sha256=digests.sha256 or earlier.sha256, blake3=digests.blake3 or earlier.blake3)
        entry = {"snapshot": dataclasses.asdict(snapshot), "digests": dataclasses.asdict(digests)} | ({"boot": boot} if boot else {})
        self._entries[str(path.resolve())] = self._learned[str(path.resolve())] = entry

    def note(self, path: Path, *, tensors: str, sha256: str) -> None:
        """Remember a file that was just written, whose digests are known without reading it."""
        self.remember(path, Digests(tensors=tensors, sha256=sha256), Snapshot.of(path))
        self.save()

    def save(self) -> None:
        """Write what was learned, over what others may have written meanwhile; failing to is no error."""
        if not self._learned:
            return
        entries = self._load() | self._learned
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path, is_lasting=False) as file:
                file.write(json.dumps({"memo": VERSION, "files": dict(sorted(entries.items()))}, indent=1).encode())
            self._learned = {}

    def _load(self) -> dict[str, Any]:
        try:
            table = json.loads(read_regular(self._path))
            return dict(table["files"]) if table["memo"] == VERSION else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
