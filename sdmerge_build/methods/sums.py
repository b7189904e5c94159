"""Owns sums that are the same on every machine: float64 terms, added element by element in a fixed order and at last by `math.fsum`.

Has never heard of tensors larger than a slice. `torch.sum` adds in an order that depends on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["exact_sum", "folded", "product", "sums"]

_BLOCK = 1 << 15  # elements that are multiplied at once: with their products they stay in the second cache
_FEW_TERMS = 256  # so many are added one by one


def sums(vectors: Sequence[Tensor], pairs: Sequence[tuple[int, int | None]]) -> list[float]:
    """Sum the products of pairs of slices, or single ones: block upon block, then what lies there."""
    from sdmerge_build.methods.lanes import compiled  # noqa: PLC0415  imports torch

    flat = [vector.reshape(-1) for vector in vectors]
    terms = compiled()(flat, [(n, -1 if m is None else m) for n, m in pairs], _BLOCK, _FEW_TERMS)
    return [exact_sum(row) for row in terms.tolist()]


def folded(x: Tensor) -> Tensor:
    """Add the rows of a float64 tensor element by element: the upper half onto the lower, until one is left."""
    if not len(x):
        return x.new_zeros(x.shape[1:])
    while len(x) > 1:
        half = len(x) // 2
        folded = x[:half] + x[half : 2 * half]
        if len(x) % 2:
            folded[0] += x[-1]
        x = folded
    return x[0]


def product(x: Tensor, y: Tensor | None) -> Tensor:
    """Multiply in float64, where products of float32 numbers are exact; two float64 tensors are five times quicker than one of each."""
    wide = x.to(torch.float64)
    return wide if y is None else wide * (wide if y is x else y.to(torch.float64))


def exact_sum(terms: Sequence[float]) -> float:
    """Sum with one rounding; what is infinite or not a number stays so instead of being refused."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return sum(terms)
