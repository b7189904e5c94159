"""Owns elemental text, supermerger's `IN00-IN05:attn1:0.3`: values by block and by what a tensor's name holds.

Has never heard of files. Read as supermerger reads it, the last entry that holds wins; but what supermerger would pass over in silence
is complained of, and random ratios are refused, since results must not differ from run to run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdmerge_build.architectures import Architecture
from sdmerge_build.weights.naming import named, places, spelled
from sdmerge_build.weights.number import MAX_ENTRIES, Range, RatioError

__all__ = ["Elements", "read_elemental", "settled"]

_NOT = "NOT"
_RANDOM = frozenset({"R", "U", "X", "D", "E", "ER", "EU", "EX", "ED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """A value for the tensors whose names hold any of some words, or none of them; without words, for all."""

    words: tuple[str, ...]
    is_not: bool
    value: float

    def holds(self, tensor: str) -> bool:
        """Tell whether a tensor gets this value, unless a later element says otherwise."""
        return any(word in tensor for word in self.words) != self.is_not


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """What elemental text leaves to be decided by the names of some places' tensors; the last that holds wins."""

    places: frozenset[str]
    where: str  # the places, as text
    elements: tuple[Element, ...]

    def entries(self) -> Iterator[str]:
        """Yield the entries of a text that says the same."""
        for element in self.elements:
            yield f"{self.where}:{f'{_NOT} ' if element.is_not else ''}{' '.join(element.words)}:{element.value!r}"


Entry = tuple[frozenset[str], Element]


def read_elemental(text: Any, architecture: Architecture, owners: Mapping[str, str], numbers: Range) -> list[Entry]:
    """Read elemental text: for each entry, the places it is for, and what it says there. Raises `RatioError`."""
    if not isinstance(text, str):
        raise RatioError("has an `elemental` that is not text", 'write `elemental = "IN00-IN05:attn1:0.3, M00::0.5"`')
    entries = [entry.strip() for entry in re.split(r"[,\n]", text)]
    if len(entries) > MAX_ENTRIES or len(text.split()) > 4 * MAX_ENTRIES:
        raise RatioError(f"has more than {MAX_ENTRIES} entries, or {4 * MAX_ENTRIES} words, in `elemental`")
    return [_entry(entry, architecture, owners, numbers) for entry in entries if entry]


def settled(entries: list[Entry], values: Mapping[str, float], architecture: Architecture) -> tuple[dict[str, float], tuple[Elements, ...]]:
    """Return every place's value where no name decides, and what names decide, written in one way however the entries were."""
    settled_values: dict[str, float] = {}
    alike: dict[tuple[Element, ...], list[str]] = {}
    for place in places(architecture):
        settled_values[place], elements = _at(place, entries, values[place])
        alike.setdefault(elements, []).append(place)
    groups = ((frozenset(held), elements) for elements, held in alike.items() if elements)
    return settled_values, tuple(Elements(places=held, where=spelled(held, architecture), elements=elements) for held, elements in groups)


def _at(place: str, entries: list[Entry], value: float) -> tuple[float, tuple[Element, ...]]:
    """Find what remains of entries at one place: nothing before one without words, and of those with the same words the last."""
    kept: dict[tuple[tuple[str, ...], bool], Element] = {}
    for held, element in reversed(entries):
        if place not in held:
            continue
        if not element.words:
            value = element.value
            break
        kept.setdefault((element.words, element.is_not), element)
    return value, tuple(reversed(kept.values()))


def _entry(entry: str, architecture: Architecture, owners: Mapping[str, str], numbers: Range) -> Entry:
    fields = entry.split(":")
    if len(fields) != 3:
        message = f"has the entry `{entry[:60]}` in `elemental`, which is not BLOCKS:ELEMENTS:RATIO"
        raise RatioError(message, "an empty part stands for all: `M00::0.5`, `:norm:1`")
    if _RANDOM & set(fields[2].split()):
        message = f"has a random ratio in `elemental`: `{entry[:60]}`"
        raise RatioError(message, "results must not differ from run to run; write the number")
    value = numbers.parse(fields[2], f"the ratio of `{entry[:60]}`")
    names, is_without = _list(fields[0], entry)
    held = set(_held(names, architecture, owners)) if names else set(places(architecture))
    if is_without:
        held = set(places(architecture)) - held
    words, is_not = _list(fields[1], entry)
    shortest = tuple(sorted({word for word in words if not any(other in word and other != word for other in words)}))
    return frozenset(held), Element(words=shortest, is_not=is_not, value=value)


def _list(text: str, entry: str) -> tuple[list[str], bool]:
    """Read words between blanks, and whether NOT stands before them."""
    words = text.split()
    is_not = words[:1] == [_NOT]
    if is_not and len(words) == 1:
        raise RatioError(f"has a `{_NOT}` of nothing in `elemental`: `{entry[:60]}`")
    if _NOT in words[1:]:
        raise RatioError(f"has a `{_NOT}` in the middle of `{entry[:60]}` in `elemental`", f"`{_NOT}` stands first, and means all that follow")
    return words[is_not:], is_not


def _held(names: list[str], architecture: Architecture, owners: Mapping[str, str]) -> Iterator[str]:
    """Find the places that names mean: a part by itself, a block with the parts that follow it."""
    for name in names:
        for found in named(name, architecture, has_globs=False):
            yield found
            yield from (part for part, block in owners.items() if block == found)
