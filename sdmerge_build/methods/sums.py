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
    """Sum the products of pairs of slices, or single ones: block upon block, then what lies there.

    Products of float32 numbers are exact in float64. So it is all the same whether `addcmul` rounds once, as it does on CPUs that can, or
    first the product and then the sum, and it takes half the time; products of float64 numbers are rounded by themselves.
    """
    flat = [vector.reshape(-1) for vector in vectors]
    is_exact = [vector.dtype is not torch.float64 for vector in flat]
    size = flat[0].numel()
    terms = torch.zeros(len(pairs), min(_BLOCK, size), dtype=torch.float64)
    rows = terms.unbind()
    for start in range(0, size, _BLOCK):
        wide = [vector[start : start + _BLOCK].to(torch.float64) for vector in flat]
        if size - start < _BLOCK:
            rows = terms[:, : size - start].unbind()
        for row, (n, m) in zip(rows, pairs, strict=True):
            if m is None:
                row.add_(wide[n])
            elif is_exact[n] and is_exact[m]:
                row.addcmul_(wide[n], wide[m])
            else:
                row.add_(wide[n] * wide[m])
    return [exact_sum(row) for row in _added_up(terms).tolist()]


def _added_up(terms: Tensor) -> Tensor:
    """Add up the rows of a float64 tensor, which is overwritten: the upper half of each onto the lower, until few terms are left."""
    count = terms.shape[1]
    while count > _FEW_TERMS:
        half = count // 2
        terms[:, :half].add_(terms[:, half : 2 * half])  # `+=` would copy what it added onto itself
        if count % 2:
            terms[:, 0].add_(terms[:, count - 1])
        count = half
    return terms[:, :count]


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
