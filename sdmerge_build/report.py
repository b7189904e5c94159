"""Owns the outcome of one run, as it is told to whoever asked for it.

Has never heard of how it came about, or of how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdmerge_build.coverage import Use
from sdmerge_build.plan import Plan
from sdmerge_build.prepare import Wish

__all__ = ["Report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of one run: what was asked for, in recipe order, and what became of it."""

    recipe: Path
    wishes: Sequence[Wish]
    bytes_read: int
    bytes_written: int
    published: int
    missing: Mapping[str, int]  # bytes that a plan would have to download, by source
    seconds: float
    warnings: Sequence[str]
    plan: Plan
    uses: Sequence[Use]  # what adapters do, where it is a plan

    @property
    def exit_code(self) -> int:
        """Return 0, or the code of the first artifact that failed."""
        return next((wish.error.exit_code for wish in self.wishes if wish.error), 0)
