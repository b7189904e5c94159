"""Owns the braces that names in tables are written with: one line stands for many names.

Has never heard of tensors. `{q,k}` and `{0..3}` stand for each of these, both ends included; `{00..11}` is written as wide as its first
number; `{n=00..11}` also gives what it stands for a letter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

__all__ = ["BRACES", "fill", "spell"]

BRACES = re.compile(r"\{([^{}]*)\}")


def spell(pattern: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Spell out braces; each name comes with what its letters stand for, numbers without leading zeros."""
    parted = [inner.rpartition("=") for inner in BRACES.findall(pattern)]
    literals = BRACES.sub("\0", pattern).split("\0")
    for picked in itertools.product(*(_choices(inner) for _, _, inner in parted)):
        texts = [text for text, _ in picked]
        name = "".join(itertools.chain.from_iterable(itertools.zip_longest(literals, texts, fillvalue="")))
        yield name, {letter: value for (letter, _, _), (_, value) in zip(parted, picked, strict=True) if letter}


def fill(template: str, bound: Mapping[str, str]) -> str:
    """Put what letters stand for in place of `{letter}`."""
    return BRACES.sub(lambda found: bound[found[1]], template)


def _choices(inner: str) -> list[tuple[str, str]]:
    first, dots, last = inner.partition("..")
    if not dots:
        return [(word, word) for word in inner.split(",")]
    return [(f"{n:0{len(first)}}", str(n)) for n in range(int(first), int(last) + 1)]
