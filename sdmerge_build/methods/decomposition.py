"""Owns decompositions: matrices into two factors of a rank, and which rank that is.

Has never heard of adapters or names. All of it is float64. A matrix is decomposed by way of the small square of its shorter side, a fraction of
the work of a full SVD: eigenvalues of the square know singular values below 1e-8 of the largest no more, but a difference of float16 or float32
numbers has no digits there; the other factor is then the matrix itself, projected, so that `up @ down` is the best of its span whatever the
vectors are, and its singular values are the lengths of what was projected, which lose nothing. Where all that is small counts (factors of
adapters, whose product nobody forms), it is LAPACK's own SVD, of a core no larger than the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdmerge_build.methods import Place
from sdmerge_build.methods.chance import normal

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["Factors", "Limits", "decomposed", "decomposed_product"]

_COLUMNS = 2048  # of a wide matrix that are float64 at once
_OVERSAMPLED = 16  # random vectors beside those that are wanted; Halko, Martinsson and Tropp advise 5 or 10
_ITERATIONS = 2  # of the subspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of a matrix is kept."""

    rank: int
    energy: float = 1.0
    threshold: float = 0.0
    clamp: float = 1.0
    randomized: bool = False
    seed: int = 0
    name: str = ""  # of the tensor, for random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """A matrix, nearly: `up @ down`, and what share of its energy that is."""

    up: Tensor
    down: Tensor
    kept: float
    energy: float  # sum of squares of the whole


def decomposed(matrix: Tensor, limits: Limits) -> Factors:
    """Decompose a matrix of float32 or float64 numbers."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else matrix.t()
    is_random = limits.randomized and limits.rank + _OVERSAMPLED < wide.shape[0]
    basis, other, total = _randomly(wide, limits) if is_random else _exactly(wide, limits)
    sizes = other.square().sum(1).sqrt()
    rank = _rank(sizes, total, limits)
    basis, other, sizes = _signed(basis[:, :rank], other[:rank], sizes[:rank])
    other = other / torch.where(sizes > 0, sizes, 1.0).unsqueeze(1)
    left, right = (basis, other) if is_wide else (other.t(), basis.t())
    return _factors(left, sizes, right, total, limits)


def decomposed_product(up: Tensor, down: Tensor, limits: Limits) -> Factors:
    """Decompose `up @ down`, which is not formed unless it is the smaller."""
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return decomposed(up @ down, limits)
    outer, first = torch.linalg.qr(up)
    inner, second = torch.linalg.qr(down.t())
    left, sizes, right = torch.linalg.svd(first @ second.t(), full_matrices=False)
    total = float(sizes.square().sum())
    rank = _rank(sizes, total, limits)
    basis, other, sizes = _signed(outer @ left[:, :rank], right[:rank] @ inner.t(), sizes[:rank])
    return _factors(basis, sizes, other, total, limits)


def _parts(wide: Tensor) -> Iterator[Tensor]:
    """Yield a wide matrix some columns at a time, in float64."""
    for start in range(0, wide.shape[1], _COLUMNS):
        yield wide[:, start : start + _COLUMNS].to(torch.float64)


def _exactly(wide: Tensor, limits: Limits) -> tuple[Tensor, Tensor, float]:
    """Find the leading left singular vectors, what the matrix is seen from them, and its sum of squares."""
    square = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64)
    for part in _parts(wide):
        square += part @ part.t()
    total = float(square.diagonal().sum())
    basis = _vectors(square)[:, : limits.rank]
    return basis, torch.cat([basis.t() @ part for part in _parts(wide)], dim=1), total


def _randomly(wide: Tensor, limits: Limits) -> tuple[Tensor, Tensor, float]:
    """Find them nearly, by subspace iteration: Halko, Martinsson and Tropp's algorithms 4.4 and 5.1.

    Iterations only turn vectors, so float32 is enough for them; what is kept is computed in float64.
    """
    count = limits.rank + _OVERSAMPLED
    place = Place(name=limits.name, shape=(wide.shape[0], count), start=0, count=wide.shape[0] * count, architecture="")
    vectors = normal(limits.seed, place).view(wide.shape[0], count).to(torch.float32)
    rough = wide.to(torch.float32)
    for _ in range(_ITERATIONS):
        vectors = torch.linalg.qr(rough @ (rough.t() @ vectors)).Q
    frame = torch.linalg.qr(vectors.to(torch.float64)).Q
    total = math.fsum(float(part.square().sum()) for part in _parts(wide))
    seen = torch.cat([frame.t() @ part for part in _parts(wide)], dim=1)
    turn = _vectors(seen @ seen.t())[:, : limits.rank]
    return frame @ turn, turn.t() @ seen, total


def _vectors(square: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix, the leading first."""
    if not torch.isfinite(square).all():  # LAPACK refuses what is not finite; who writes the result complains of it by name
        return torch.full_like(square, math.nan)
    found: Tensor = torch.linalg.eigh(square).eigenvectors.flip(1)
    return found


def _rank(sizes: Tensor, total: float, limits: Limits) -> int:
    """Decide how many singular values are kept, of those that were found, the largest first: at least one."""
    rank = min(limits.rank, len(sizes))
    if limits.energy < 1:
        rank = min(rank, int((sizes.square().cumsum(0) < limits.energy * total).sum()) + 1)
    if limits.threshold > 0:
        rank = min(rank, int((sizes > limits.threshold * sizes[0]).sum()))
    return max(1, rank)


def _signed(left: Tensor, right: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the signs of singular vectors: what is largest in a left one is positive."""
    largest = left.abs().argmax(0, keepdim=True)
    signs = torch.where(left.gather(0, largest) < 0, -1.0, 1.0)
    return left * signs, right * signs.t(), sizes


def _factors(left: Tensor, sizes: Tensor, right: Tensor, total: float, limits: Limits) -> Factors:
    """Share the singular values out: a root to each factor, or all to the first where numbers are to be cut off as others do."""
    kept = float(sizes.square().sum()) / total if total else 1.0
    if limits.clamp < 1:
        up, down = _clamped(left * sizes, right, limits.clamp)
    else:
        root = sizes.sqrt()
        up, down = left * root, right * root.unsqueeze(1)
    return Factors(up=up.contiguous(), down=down.contiguous(), kept=kept, energy=total)


def _clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Cut numbers off at a quantile of them all, linearly interpolated, on both sides of zero."""
    numbers = torch.cat([up.flatten(), down.flatten()]).sort().values
    position = quantile * (len(numbers) - 1)
    below = math.floor(position)
    low, high = numbers[below], numbers[min(below + 1, len(numbers) - 1)]
    limit = float(low + (high - low) * (position - below))
    return up.clamp(-limit, limit), down.clamp(-limit, limit)
