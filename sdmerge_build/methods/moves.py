"""Owns what a method that moves tensors decides: which tensors there are afterwards, and of which each is made.

Has never heard of torch or dtypes: names and shapes decide.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from sdmerge_build.architectures import Architecture
from sdmerge_build.architectures.layout import Shape
from sdmerge_build.architectures.made import Made

__all__ = ["PATTERN", "Model", "Moves", "bad_pattern", "is_named", "names_of"]

PATTERN = "/"
"""What a regular expression in a list of components and globs begins and ends with."""

_MOST_REPEATS = 3  # of unbounded length; each multiplies how often a name is looked at by its length
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|\{\d+\}|\{[^}]*\}|.", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model among a step's inputs, as far as moving its tensors asks for it."""

    name: str
    role: str
    shapes: Mapping[str, Shape]


@dataclass(slots=True, kw_only=True)
class Moves:
    """Which tensors there are afterwards: of which input each is taken, and how it is made there."""

    architecture: Architecture
    tensors: dict[str, tuple[int, Made]] = field(default_factory=dict)
    looked_at: dict[str, str] = field(default_factory=dict)  # a tensor of an input → the name by which the method selects it, if another
    notes: dict[str, list[str]] = field(default_factory=dict)  # what is done → the tensors it is done to
    complaints: list[tuple[str, str, str]] = field(default_factory=list)  # what is wrong, with which tensor, and a hint

    def take(self, name: str, model: int, made: Made | None = None) -> None:
        """Take a tensor from an input; two of one name are a mistake."""
        if name in self.tensors:
            self.complaints.append(("would have two tensors of one name", name, ""))
        self.tensors[name] = model, made or Made((name,))

    def note(self, what: str, names: Sequence[str]) -> None:
        """Say what is done to some tensors, if there are any."""
        if names:
            self.notes.setdefault(what, []).extend(names)


def is_named(selection: tuple[str, ...], tensor: str, component: str) -> bool:
    """Tell whether a list of components, globs, and regular expressions between slashes names a tensor."""
    globs, patterns = _sorted(selection)
    return any(component == glob or fnmatchcase(tensor, glob) for glob in globs) or any(pattern.search(tensor) for pattern in patterns)


def names_of(selection: tuple[str, ...], architecture: Architecture) -> Callable[[str], bool]:
    """Return whether a tensor of an architecture is named by a list."""
    return lambda tensor: is_named(selection, tensor, architecture.component_of(tensor))


@functools.lru_cache(maxsize=256)
def _sorted(selection: tuple[str, ...]) -> tuple[list[str], list[re.Pattern[str]]]:
    """Tell components and globs from regular expressions."""
    return [item for item in selection if not _is_pattern(item)], [re.compile(item[1:-1]) for item in selection if _is_pattern(item)]


def bad_pattern(item: str) -> str:
    """Say what is wrong with an entry that is a regular expression; nothing when it is none, or will do.

    What could take for ever on a long name is refused: repeated groups, references to groups, and many repeats of any length.
    """
    if not _is_pattern(item):
        return ""
    before, repeats = "", 0
    for piece in _TOKEN.findall(item[1:-1]):
        is_repeat = piece in {"*", "+", "?", "|"} or piece.startswith("{")
        if is_repeat and piece not in {"?", "|"} and before == ")":
            return f"has the regular expression `{item}`, which repeats a group, and could take for ever"
        if piece == "(?" or (piece[0] == "\\" and piece[1].isdigit()):
            return f"has the regular expression `{item}`, which looks around or back"
        repeats += is_repeat
        before = piece
    if repeats > _MOST_REPEATS:
        return f"has the regular expression `{item}`, which repeats more than {_MOST_REPEATS} things, or has as many choices"
    try:
        re.compile(item[1:-1])
    except (re.error, OverflowError) as error:
        return f"has the regular expression `{item}`, which cannot be read: {error}"
    return ""


def _is_pattern(item: str) -> bool:
    return len(item) > 2 and item.startswith(PATTERN) and item.endswith(PATTERN)
