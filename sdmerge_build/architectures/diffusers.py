"""Owns the expansion of an architecture's `[diffusers]` table: which tensor of diffusers is which tensor of a checkpoint.

Has never heard of files or bytes. What the tables mean is written in `diffusers.toml`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdmerge_build.architectures.braces import BRACES, spell

__all__ = ["STACKED", "SWAPPED", "TRANSPOSED", "WIDENED", "FolderNames", "Place", "read_names"]

WIDENED, TRANSPOSED, STACKED = WAYS = ("widened", "transposed", "stacked")

SWAPPED = "swapped"
"""The two halves of the first dimension change places; a table says so in `swapped`, not line by line, as variants differ there."""

_TERM = re.compile(r"([+-]?)(?:(\d+)\*)?(\w+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a folder keeps a tensor: in which component, under which names, and what makes the original of them.

    There are several names when they are stacked, in the order they are stacked in; `how` is empty when the bytes and the shape are the same.
    """

    component: str
    names: tuple[str, ...]
    how: str = ""
    sizes: tuple[int, ...] = ()  # of those that are stacked, beside each other


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderNames:
    """The names of one architecture in a diffusers folder, both ways."""

    architecture: str
    present: tuple[str, ...]  # `component.name`s; none when folders are not read
    absent: tuple[str, ...]
    places: Mapping[str, Place]  # original name → place; no two originals share one
    originals: Mapping[tuple[str, str], tuple[str, int]]  # component and name, other spellings too → original, which of the place's names
    dropped: Collection[tuple[str, str]]  # components and names of tensors that have no original and hold nothing

    def fits(self, names: Collection[str]) -> bool:
        """Tell whether a folder with these `component.name`s is of this architecture."""
        return bool(self.present) and all(n in names for n in self.present) and not any(n in names for n in self.absent)


def read_names(
    architecture: str, table: Mapping[str, Any], shared: Mapping[str, Any], layout: Iterable[str], swapped: Collection[str] = ()
) -> FolderNames:
    """Spell out a `[diffusers]` table for the tensors of a layout; `shared` is `diffusers.toml`, `swapped` what their modules are."""
    below = _by_prefix(layout)
    places: dict[str, Place] = {}
    for component, entry in table["components"].items():
        for theirs, ours, how, size in _prefixes(entry["names"], shared, "", entry["prefix"]):
            for name in below.get(ours, ()):
                before = places[name] if name in places and how == STACKED else Place(component, ())
                way = SWAPPED if name.rpartition(".")[0] in swapped else how
                sizes = (*before.sizes, size) if how == STACKED else ()
                places[name] = Place(component, (*before.names, theirs + name.removeprefix(ours)), way, sizes)
    originals = {(place.component, name): (ours, n) for ours, place in places.items() for n, name in enumerate(place.names)}
    for component, spellings in shared["also"].items():
        below = _by_prefix(name for where, name in originals if where == component)
        for other, written, _, _ in _prefixes(spellings, {}, "", ""):
            originals |= {(component, other + name.removeprefix(written)): originals[component, name] for name in below.get(written, ())}
    return FolderNames(
        architecture=architecture,
        present=tuple(table.get("present", ())),
        absent=tuple(table.get("absent", ())),
        places=places,
        originals=originals,
        dropped=frozenset((component, name) for component, dropped in table.get("dropped", {}).items() for name in dropped),
    )


def _by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """List the names at or below each of their prefixes; dots divide them."""
    below: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        for n in range(1, len(words) + 1):
            below.setdefault(".".join(words[:n]), []).append(name)
    return below


def _prefixes(table: Mapping[str, str], shared: Mapping[str, Any], theirs: str, ours: str) -> Iterator[tuple[str, str, str, int]]:
    """Yield the folder's prefix, the original's, what makes one of the other, and its size, for every line of a table and those it calls."""
    for pattern, value in table.items():
        original, word, size, *_ = [*value.split(), "", ""]
        for suffix, bound in spell(pattern):
            left = f"{theirs}.{suffix}".strip(".")
            right = f"{ours}.{BRACES.sub(lambda found: _computed(found[1], bound), original)}".strip(".")  # noqa: B023  called at once
            if word and word not in WAYS:
                yield from _prefixes(shared[word], shared, left, right)
            else:
                yield left, right, word, int(size or 1)


def _computed(expression: str, bound: Mapping[str, str]) -> str:
    """Compute a sum such as `3*i+j+1`; a letter alone may stand for a word."""
    if expression in bound:
        return bound[expression]
    terms = _TERM.findall(expression)
    return str(sum(int(f"{sign}1") * int(factor or 1) * int(bound.get(term, term)) for sign, factor, term in terms))
