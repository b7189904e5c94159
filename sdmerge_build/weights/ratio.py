"""Owns ratios: a number or a table over blocks and tensor names, resolved to one number per tensor.

Has never heard of methods or files. Entries apply in order and the last match wins: a profile (`base`, `mbw`, `preset`, `curve`), then
`blocks`, then `elemental`, then `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from sdmerge_build.architectures import BASE, Architecture
from sdmerge_build.errors import nearest
from sdmerge_build.weights.elemental import Elements, read_elemental, settled
from sdmerge_build.weights.naming import named, owners, places
from sdmerge_build.weights.number import MAX_ENTRIES, Range, RatioError
from sdmerge_build.weights.profile import PROFILES, read_profile

__all__ = ["MAX_ENTRIES", "Ratio", "RatioError", "read_ratio"]

_FIELDS = ("base", *PROFILES, "blocks", "elemental", "rules", "map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A resolved ratio: the value of every tensor, without having seen one."""

    base: float
    blocks: Mapping[str, float]  # blocks unlike `base`, then parts unlike their block, in the architecture's order
    elemental: tuple[Elements, ...] = ()  # each for other places
    rules: tuple[tuple[str, float], ...] = ()

    @property
    def is_number(self) -> bool:
        """Tell whether every tensor gets `base`."""
        return not (self.blocks or self.reads_names)

    @property
    def reads_names(self) -> bool:
        """Tell whether tensors of one block may get different values, by their names."""
        return bool(self.elemental or self.rules)

    def of(self, tensor: str, architecture: Architecture) -> float:
        """Return the value for one tensor."""
        for pattern, value in reversed(self.rules):
            if fnmatchcase(tensor, pattern):
                return value
        if not (self.blocks or self.elemental):
            return self.base
        block, part = architecture.block_of(tensor)
        for group in self.elemental:
            if (part or block) in group.places:
                for element in reversed(group.elements):
                    if element.holds(tensor):
                        return element.value
        return self.at(block, part)

    def at(self, block: str, part: str | None = None) -> float:
        """Return the value of a block, or of a part of it, where no tensor's name decides."""
        return self.blocks.get(part or block, self.blocks.get(block, self.base))

    def values(self) -> set[float]:
        """Collect every value that some tensor might get."""
        by_name = {element.value for group in self.elemental for element in group.elements} | {value for _, value in self.rules}
        return {self.base, *self.blocks.values()} | by_name

    def idle(self, tensors: Collection[str], architecture: Architecture) -> Iterator[str]:
        """Yield what is written in it and names no tensor: words of elemental entries, seen in their blocks, and globs of rules."""
        places = {tensor: part or block for tensor in tensors for block, part in [architecture.block_of(tensor)]} if self.elemental else {}
        said = dict.fromkeys(word for group in self.elemental for element in group.elements for word in element.words)
        for word in said:
            held = set().union(*(group.places for group in self.elemental for element in group.elements if word in element.words))
            if not any(word in tensor for tensor, place in places.items() if place in held):
                yield f"an elemental entry for `{word}`"
        yield from (f"a rule `{pattern}`" for pattern, _ in self.rules if not any(fnmatchcase(tensor, pattern) for tensor in tensors))

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what decides the values, as `(suffix, value)`; equal ratios yield equal facts, however they were written."""
        yield "", repr(self.base)
        for block, value in self.blocks.items():
            yield f".{block}", repr(value)
        for n, entry in enumerate((entry for group in self.elemental for entry in group.entries()), 1):
            yield f".elemental{n}", entry
        for n, (pattern, value) in enumerate(self.rules, 1):
            yield f".rule{n}", f"{pattern} = {value!r}"


def read_ratio(value: Any, architecture: Architecture, low: float = -math.inf, high: float = math.inf) -> Ratio:
    """Read a ratio as a recipe writes it, all of its numbers from `low` to `high`. Raises `RatioError`."""
    numbers = Range(low, high)
    if not isinstance(value, Mapping):
        return Ratio(base=numbers.read(value, "a ratio"), blocks={})
    if unknown := [key for key in value if key not in _FIELDS]:
        message = f"has an unknown field `{unknown[0]}`"
        listed = ", ".join(f"`{field}`" for field in _FIELDS[:-1])
        raise RatioError(message, nearest(unknown[0], _FIELDS) or f"a ratio table has {listed} and `{_FIELDS[-1]}`")
    follows = owners(value.get("map"), architecture)
    values = _read_blocks(value.get("blocks", {}), read_profile(value, architecture, numbers), follows, architecture, numbers)
    entries = read_elemental(value.get("elemental", ""), architecture, follows, numbers)
    values, elemental = settled(entries, values, architecture)
    base = values[BASE]
    unlike = {block: values[block] for block in architecture.blocks if values[block] != base}
    unlike |= {part: values[part] for part, (block, _) in architecture.parts.items() if values[part] != values[block]}
    return Ratio(base=base, blocks=unlike, elemental=elemental, rules=tuple(_read_rules(value.get("rules", []), numbers)))


def _read_blocks(
    table: Any, profile: Mapping[str, float], follows: Mapping[str, str], architecture: Architecture, numbers: Range
) -> dict[str, float]:
    """Change a profile as `blocks` says, entry by entry, and return the value of every place."""
    if isinstance(table, Mapping) and len(table) > MAX_ENTRIES:
        raise RatioError(f"has more than {MAX_ENTRIES} `blocks`")
    if not isinstance(table, Mapping):
        raise RatioError("has `blocks` that are not a table", 'write `blocks = { IN04 = 0.2, "OUT*" = 0.1 }`')
    unmerged = {part: 0.0 for part, block in follows.items() if not block}
    values = {**dict.fromkeys(architecture.blocks, profile[BASE]), **unmerged, **profile}
    for pattern, said in table.items():
        number = numbers.read(said, f"the value of block `{pattern}`")
        names = named(pattern, architecture)
        values |= dict.fromkeys(names, number)
        for part in names & follows.keys():  # a part follows its block, unless an entry names the part and not the block
            if follows[part] in names:
                del values[part]
    return {place: values[place if place in values else follows[place]] for place in places(architecture)}


def _read_rules(rules: Any, numbers: Range) -> Iterator[tuple[str, float]]:
    if isinstance(rules, list) and len(rules) > MAX_ENTRIES:
        raise RatioError(f"has more than {MAX_ENTRIES} `rules`")
    if not isinstance(rules, list):
        raise RatioError("has `rules` that are not a list", 'write `rules = [{ match = "*attn2*", value = 0.8 }]`')
    for rule in rules:
        if not isinstance(rule, Mapping) or rule.keys() != {"match", "value"} or not isinstance(rule["match"], str):
            raise RatioError("has a rule that is not `{ match = GLOB, value = NUMBER }`")
        yield rule["match"], numbers.read(rule["value"], f"the value of rule `{rule['match']}`")
