"""Owns the words for what is happening: the states of an artifact and the watcher that is told of them.

Has never heard of terminals; a watcher is told and cannot influence anything.
"""

from __future__ import annotations

import enum
from typing import Protocol

__all__ = ["Silent", "State", "Watcher"]


class State(enum.Enum):
    """Where an artifact stands. The build decides; everybody else reads."""

    WANTED = "wanted"  # asked for, and not in the store
    REUSED = "reused"  # its key was already in the store
    EMITTED = "re-emitted"  # stored tensors behind a new header; nothing was merged
    BUILT = "built"
    FAILED = "failed"
    BLOCKED = "blocked"  # something it needs failed, so it never started


class Watcher(Protocol):
    """Told what happens."""

    def started(self, what: str, nbytes: int) -> None:
        """Hear that work of `nbytes` bytes begins."""

    def advanced(self, nbytes: int) -> None:
        """Hear that `nbytes` more bytes are done; called from several threads."""

    def finished(self) -> None:
        """Hear that the work is over, well or not."""

    def note(self, message: str) -> None:
        """Hear something a person should know."""


class Silent:
    """A watcher that says nothing."""

    def started(self, what: str, nbytes: int) -> None:
        """Say nothing."""

    def advanced(self, nbytes: int) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""

    def note(self, message: str) -> None:
        """Say nothing."""
