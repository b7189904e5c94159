"""Owns ratios: a number or a table over blocks and tensor names, resolved to one number per tensor.

Has never heard of methods or files. Entries apply in order and the last match wins: base, then `mbw`, then `blocks`, then `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from sdmerge_build.architectures import BASE, Architecture
from sdmerge_build.errors import nearest

__all__ = ["MAX_ENTRIES", "Ratio", "RatioError", "read_ratio"]

_FIELDS = ("base", "mbw", "blocks", "rules")
_GLOB = frozenset("*?[")
MAX_ENTRIES = 1000


class RatioError(ValueError):
    """A ratio cannot be read; `hint` says what to type instead."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A resolved ratio: the value of every tensor, without having seen one."""

    base: float
    blocks: Mapping[str, float]  # blocks unlike `base`, then parts unlike their block, in the architecture's order
    rules: tuple[tuple[str, float], ...] = ()

    def of(self, tensor: str, architecture: Architecture) -> float:
        """Return the value for one tensor."""
        for glob, value in reversed(self.rules):
            if fnmatchcase(tensor, glob):
                return value
        if not self.blocks:
            return self.base
        block, part = architecture.block_of(tensor)
        return self.blocks.get(part or block, self.blocks.get(block, self.base))

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what decides the values, as `(suffix, value)`; equal ratios yield equal facts, however they were written."""
        yield "", repr(self.base)
        for block, value in self.blocks.items():
            yield f".{block}", repr(value)
        for n, (glob, value) in enumerate(self.rules, 1):
            yield f".rule{n}", f"{glob} = {value!r}"


def read_ratio(value: Any, architecture: Architecture) -> Ratio:
    """Read a ratio as a recipe writes it. Raises `RatioError`."""
    if not isinstance(value, Mapping):
        return Ratio(base=_number(value, "a ratio"), blocks={})
    if unknown := [key for key in value if key not in _FIELDS]:
        message = f"has an unknown field `{unknown[0]}`"
        raise RatioError(message, nearest(unknown[0], _FIELDS) or "a ratio table has `base`, `mbw`, `blocks` and `rules`")
    said = _number(value["base"], "`base`") if "base" in value else None
    if "mbw" in value:
        blocks = _read_mbw(value["mbw"], said, architecture)
        base = blocks[BASE]
    elif said is not None:
        base = said
        blocks = dict.fromkeys(architecture.blocks, base)
    else:
        raise RatioError("lacks `base`, the value of everything that no block or rule names", "write `base = 0.5`")
    parts: dict[str, float] = {}
    for names, number in _read_blocks(value.get("blocks", {}), architecture):
        blocks |= dict.fromkeys((b for b in blocks if b in names), number)
        for part in names & architecture.parts.keys():  # a part follows its block, unless an entry names the part and not the block
            if architecture.parts[part][0] in names:
                parts.pop(part, None)
            else:
                parts[part] = number
    rest = blocks.get(BASE, base)
    unlike = {b: v for b, v in blocks.items() if v != rest}
    unlike |= {p: parts[p] for p, (block, _) in architecture.parts.items() if p in parts and parts[p] != blocks[block]}
    return Ratio(base=rest, blocks=unlike, rules=tuple(_read_rules(value.get("rules", []))))


def _number(value: Any, what: str) -> float:
    """Read a finite number; the two zeros are one."""
    if isinstance(value, str):
        advice = 'block weights are written `{ mbw = "0.5,0,…" }`' if "," in value else "write the number without quotes"
        raise RatioError(f"has text as {what}: {value[:40]!r}", advice)
    try:
        number = float(value) if type(value) in {int, float} else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        message = f"has {repr(value)[:40]} as {what}, which is not a finite number"
        raise RatioError(message)
    return number + 0.0


def _read_mbw(text: Any, base: float | None, architecture: Architecture) -> dict[str, float]:
    """Read block weights as people paste them: a value per block, BASE first, or without BASE when `base` says it."""
    names = list(architecture.blocks)
    if not names:
        message = f"has `mbw`, but {architecture.title} has no blocks"
        raise RatioError(message, "use `rules` with globs over tensor names")
    if not isinstance(text, str):
        raise RatioError("has an `mbw` that is not text", 'write `mbw = "0.5,0,…"`')
    values = [_read_weight(n, item) for n, item in enumerate(text.split(","), 1)]
    if base is not None and len(values) == len(names):
        message = f"has both `base` and an `mbw` of {len(values)} values, the first of which is BASE"
        raise RatioError(message, "leave one of them out")
    wanted = len(names) if base is None else len(names) - 1
    if len(values) != wanted:
        message = f"has an `mbw` of {len(values)} values; {architecture.title} takes {wanted} {'with' if base is None else 'without'} BASE"
        without = "; to leave BASE out, write `base` beside `mbw`" if len(values) == wanted - 1 else ""
        raise RatioError(message, f"the order is {', '.join(names[len(names) - wanted :][:3])}, …, {names[-1]}{without}")
    return dict(zip(names, values if base is None else [base, *values], strict=True))


def _read_weight(n: int, text: str) -> float:
    try:
        return _number(float(text), f"value {n} of `mbw`")
    except ValueError as error:
        if isinstance(error, RatioError):
            raise
        raise RatioError(f"has {text.strip()[:40]!r} as value {n} of `mbw`, which is not a number", "leave out a preset's name") from None


def _read_blocks(table: Any, architecture: Architecture) -> Iterator[tuple[set[str], float]]:
    """Read `blocks`: for each entry, the blocks and parts it names, and its value."""
    if isinstance(table, Mapping) and len(table) > MAX_ENTRIES:
        raise RatioError(f"has more than {MAX_ENTRIES} `blocks`")
    if not isinstance(table, Mapping):
        raise RatioError("has `blocks` that are not a table", 'write `blocks = { IN04 = 0.2, "OUT*" = 0.1 }`')
    known = [*architecture.blocks, *architecture.parts]
    for pattern, value in table.items():
        yield _named(pattern, known, architecture), _number(value, f"the value of block `{pattern}`")


def _named(pattern: str, known: list[str], architecture: Architecture) -> set[str]:
    """Find what a pattern names: a block or part, a range of blocks such as `IN05-IN08`, or a glob."""
    blocks = list(architecture.blocks)
    first, dash, last = pattern.partition("-")
    if dash and first in blocks and last in blocks:
        low, high = sorted((blocks.index(first), blocks.index(last)))
        return set(blocks[low : high + 1])
    names = {name for name in known if name == pattern or (_GLOB & set(pattern) and fnmatchcase(name, pattern))}
    if not names:
        message = f"names block `{pattern}`, which {architecture.title} does not have"
        raise RatioError(message, nearest(pattern, known) or (f"its blocks are {', '.join(known)}" if known else "use `rules`"))
    return names


def _read_rules(rules: Any) -> Iterator[tuple[str, float]]:
    if isinstance(rules, list) and len(rules) > MAX_ENTRIES:
        raise RatioError(f"has more than {MAX_ENTRIES} `rules`")
    if not isinstance(rules, list):
        raise RatioError("has `rules` that are not a list", 'write `rules = [{ match = "*attn2*", value = 0.8 }]`')
    for rule in rules:
        if not isinstance(rule, Mapping) or rule.keys() != {"match", "value"} or not isinstance(rule["match"], str):
            raise RatioError("has a rule that is not `{ match = GLOB, value = NUMBER }`")
        yield rule["match"], _number(rule["value"], f"the value of rule `{rule['match']}`")
