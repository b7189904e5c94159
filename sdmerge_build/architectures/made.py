"""Owns how a tensor is made, bit for bit, of stored tensors that have other names or shapes.

Has never heard of which these are, nor of bytes: it knows names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdmerge_build.architectures.diffusers import STACKED, SWAPPED, TRANSPOSED, WIDENED
from sdmerge_build.architectures.layout import Shape

__all__ = ["COUNTED", "FLATTENED", "Made"]

FLATTENED = "flattened"
"""[o, i, 1, 1] becomes [o, i], the same bytes: `widened` the other way."""

COUNTED = "counted"
"""0, 1, 2, … as whole numbers of 64 bits, made of nothing."""


@dataclass(frozen=True, slots=True)
class Made:
    """How a tensor is made of others: as the one it names is, with its bytes in another shape, turned, stacked, or a part of one."""

    names: tuple[str, ...]  # several when they are stacked, in that order; none when it is counted
    how: str = ""
    part: tuple[int, int, int] = (0, 1, 1)  # of the first dimension: the first, and how many, of so many equal parts
    sizes: tuple[int, ...] = ()  # of those that are stacked, beside each other; nothing when they are alike

    @property
    def is_renamed(self) -> bool:
        """Tell whether it has every byte of one tensor, in its order."""
        return len(self.names) == 1 and self.how not in {TRANSPOSED, SWAPPED} and self.part == (0, 1, 1)

    def shape(self, shapes: Sequence[Shape]) -> Shape | None:
        """Return the shape it has, made of tensors of these shapes; None where these do not go together."""
        first = shapes[0]
        _, count, total = self.part
        if self.how == STACKED:
            sizes = self.sizes or (1,) * len(shapes)
            pairs = zip(sizes, shapes, strict=True)
            is_even = all(shape and (shape[0] * sizes[0], shape[1:]) == (size * first[0], first[1:]) for size, shape in pairs)
            return (sum(shape[0] for shape in shapes), *first[1:]) if is_even else None
        if self.how == SWAPPED:
            return first if first and first[0] % 2 == 0 else None
        if self.how == TRANSPOSED:
            return first[::-1] if len(first) == 2 else None
        if self.how == WIDENED:
            return (*first[:2], 1, 1) if len(first) in {2, 4} and math.prod(first[2:]) == 1 else None
        if self.how == FLATTENED:
            return first[:2] if len(first) in {2, 4} and math.prod(first[2:]) == 1 else None
        if total > 1:
            return (first[0] // total * count, *first[1:]) if first and not first[0] % total else None
        return first
