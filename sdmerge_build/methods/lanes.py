"""Owns the inner loop of sums: products of slices are added up block upon block, and their halves upon each other.

Has never heard of what is summed. Imports torch, and is imported when something is.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["added_up", "compiled"]

_lock = threading.Lock()


def added_up(vectors: list[Tensor], pairs: list[tuple[int, int]], block: int, few: int) -> Tensor:
    """Sum the products of pairs of flat slices, or with -1 a slice itself, until at most `few` terms of each are left: float64 (pairs, terms).

    Products of float32 numbers are exact in float64. So it is all the same whether `addcmul` rounds once, as it does on CPUs that can, or
    first the product and then the sum, and it takes half the time; products of float64 numbers are rounded by themselves.
    """
    size = vectors[0].numel()
    terms = torch.zeros([len(pairs), min(block, size)], dtype=torch.float64)
    for start in range(0, size, block):
        count = min(block, size - start)
        wide = [vector[start : start + count].to(torch.float64) for vector in vectors]
        for k, (n, m) in enumerate(pairs):
            row = terms[k, :count]
            if m < 0:
                row.add_(wide[n])
            elif vectors[n].dtype == torch.float64 or vectors[m].dtype == torch.float64:
                row.add_(wide[n] * wide[m])
            else:
                row.addcmul_(wide[n], wide[m])
    count = terms.size(1)
    while count > few:
        half = count // 2
        terms[:, :half].add_(terms[:, half : 2 * half])
        if count % 2 == 1:
            terms[:, 0].add_(terms[:, count - 1])
        count = half
    return terms[:, :count]


def compiled() -> Callable[[list[Tensor], list[tuple[int, int]], int, int], Tensor]:
    """Return `added_up` as TorchScript, which runs from its first operation to its last without Python's lock.

    The same operations make the same bits. Measured with two threads: waiting for the lock after each of 40 short operations took longer than
    these. Where torch has no TorchScript any more, it runs in Python.
    """
    with _lock:
        return _compiled()


@functools.cache
def _compiled() -> Callable[[list[Tensor], list[tuple[int, int]], int, int], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.script(added_up)
        except (AttributeError, RuntimeError):
            return added_up
