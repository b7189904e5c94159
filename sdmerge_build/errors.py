"""Owns what can go wrong for a person: the tree of errors, their exit codes, and the shape of a complaint.

Has never heard of recipes, tensors or terminals; only the command line prints what is raised here.

    SdbuildError            1  a step failed
    ├── RecipeError         2  the recipe or the command line is wrong
    ├── LicenceError        3  the terms of what an artifact is made of forbid its release
    ├── IntegrityError      4  bytes are not what they claim to be
    ├── SourceError         5  a source is nowhere to be found
    └── SpaceError          7  the disk is too full
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "IntegrityError",
    "Issue",
    "LicenceError",
    "RecipeError",
    "SdbuildError",
    "SourceError",
    "SpaceError",
    "UnreachableError",
    "in_file_order",
    "joined",
    "named_briefly",
    "nearest",
    "printable",
]


MAX_KNOWN = 500  # looking for the nearest takes a microsecond per word and mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """One complaint: where it is, what is wrong, and what to type next."""

    what: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n\nhint: {self.hint}" if self.hint else text

    def __post_init__(self) -> None:
        for field in ("where", "what", "hint"):  # names come from strangers; a terminal must not obey them
            object.__setattr__(self, field, printable(getattr(self, field)))


class SdbuildError(Exception):
    """Something a person can act on; carries every issue that was found, in order."""

    exit_code = 1

    def __init__(self, *issues: Issue) -> None:
        super().__init__("\n".join(str(issue) for issue in issues))
        self.issues = issues


class RecipeError(SdbuildError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class LicenceError(SdbuildError):
    """What an artifact is made of comes under terms that forbid to release it as the recipe says."""

    exit_code = 3


class IntegrityError(SdbuildError):
    """A file is not what it claims to be."""

    exit_code = 4


class SourceError(SdbuildError):
    """A source cannot be found."""

    exit_code = 5


class UnreachableError(SourceError):
    """A source is elsewhere, and nobody answers there."""


class SpaceError(SdbuildError):
    """The disk is too full."""

    exit_code = 7


def joined(errors: list[SdbuildError]) -> SdbuildError:
    """Make one error of several; the first decides what kind it is."""
    issues = dict.fromkeys(issue for error in errors for issue in error.issues)
    return type(errors[0])(*issues)


def printable(text: str) -> str:
    """Spell out what a terminal might obey: control characters, line ends, broken encodings."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_file_order(issues: Iterable[Issue]) -> list[Issue]:
    """Sort issues by the line they name, keeping the order of those on one line."""

    def line(issue: Issue) -> int:
        _, _, number = issue.where.rpartition(":")
        return int(number) if number.isdigit() else 0

    return sorted(dict.fromkeys(issues), key=line)


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, as a hint; empty when none is near.

    >>> nearest("wieghted_sum", ["copy", "weighted_sum"])
    'did you mean `weighted_sum`?'
    """
    words = sorted(known)
    if len(words) > MAX_KNOWN:
        return ""
    folded = {w.casefold(): w for w in words}
    close = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f"did you mean `{folded[close[0]]}`?" if close else ""


def named_briefly(names: Iterable[str], most: int = 3) -> str:
    """Name the first few of many, in backticks, and count the rest."""
    listed = list(names)
    text = ", ".join(f"`{name}`" for name in listed[:most])
    return f"{text} and {len(listed) - most} more" if len(listed) > most else text
