"""Owns the expansion of an architecture's `[layout]` table into tensor names and shapes.

Has never heard of files or recipes; rehearsals ask it what a real checkpoint would hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdmerge_build.architectures.braces import spell

__all__ = ["Shape", "expand"]

Shape = tuple[int, ...]


def expand(table: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Shape]:
    """Expand a layout into `{tensor name: shape}`, sorted by name.

    A list is a shape, a text is a call of a part (`"conv i=4 o=320 k=3"`), a table nests, and braces in a name stand for several.
    """
    return dict(sorted(_expand(table, parts, {}, "")))


def _expand(table: Mapping[str, Any], parts: Mapping[str, Any], sizes: Mapping[str, int], prefix: str) -> Iterator[tuple[str, Shape]]:
    for pattern, value in table.items():
        for suffix, _ in spell(pattern):
            name = f"{prefix}.{suffix}".strip(".")
            if isinstance(value, str):
                part, *arguments = value.split()
                bound = {key: _size(text, sizes) for key, _, text in (a.partition("=") for a in arguments)}
                yield from _expand(parts[part], parts, bound, name)
            elif isinstance(value, list):
                yield name, tuple(_size(item, sizes) for item in value)
            else:
                yield from _expand(value, parts, sizes, name)


def _size(text: str | int, sizes: Mapping[str, int]) -> int:
    """Read a size: a number, a letter, or a product such as `4*c`."""
    product = 1
    for factor in str(text).split("*"):
        product *= sizes[factor] if factor in sizes else int(factor)
    return product
