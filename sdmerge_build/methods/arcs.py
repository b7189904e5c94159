"""Owns the geometry of directions: what a point on an arc, or in the middle of several directions, takes of each vector.

Has never heard of recipes. Where a tensor is one vector, all that is asked of it are dot products, and the rest are numbers.
A cosine has errors near 1e-16, and angles near 0 thereby of 1e-8, on which shares hardly depend; near opposition, where they do, there is no
arc (`FLAT`). Sums are `math.fsum`: the order in which Python's own adds depends on its version.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor

from sdmerge_build.methods import elementary, scalars
from sdmerge_build.methods.measures import columns, gram, row_sums

__all__ = ["FLAT", "middle", "on_arc", "on_column_arcs", "on_row_arcs", "on_sphere"]

FLAT = 1e-4
"""How near to opposite, as an angle, or to cancelling out, as a share of their weights, directions are between which there is no middle."""

_ASIN = (
    *(0.16666666666666666, 0.0750000000000003, 0.04464285714275918, 0.030381944456875826, 0.02237215827784222, 0.017352795706248536),
    *(0.013964083690424458, 0.011563890331777656, 0.009634411283551128, 0.009261658830434312, 0.003633730515090274, 0.014742693576934711),
)
"""(asin(w) / w - 1) / w² as a polynomial of w² in 0…0.1465; `mpmath.chebyfit` at 300 bits, rounded once."""

Gram = tuple[tuple[float, ...], ...]
"""Dot products of vectors."""

Measured = Generator[Any, Any, Tensor]


def on_sphere(a: Tensor, b: Tensor, alpha: float) -> Measured:
    """Make the vector whose direction is at `alpha` of the arc, and whose length is at `alpha` of the lengths."""
    (aa, ab), (_, bb) = yield gram(a, b)
    shares = _arc_shares(_cosine(aa, ab, bb), alpha)
    if shares is None:
        return _sum((a, b), (1 - alpha, alpha))
    lengths = math.sqrt(aa), math.sqrt(bb)
    length = lengths[0] * (1 - alpha) + lengths[1] * alpha
    return _sum((a, b), (shares[0] * (length / lengths[0]), shares[1] * (length / lengths[1])))


def on_arc(a: Tensor, b: Tensor, alpha: float, base: Tensor | None = None, flattest: float = 1.0) -> Measured:
    """Add up two vectors by the shares of the point at `alpha` of the arc; mix them where the cosine's magnitude is above `flattest`."""
    a, b = (a, b) if base is None else (a.double() - base, b.double() - base)
    (aa, ab), (_, bb) = yield gram(a, b)
    cos = _cosine(aa, ab, bb)
    shares = None if abs(cos) > flattest else _arc_shares(cos, alpha)
    return _sum((a, b), shares or (1 - alpha, alpha), base)


def on_row_arcs(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Do the same with each row."""
    a, b = a.double(), b.double()
    first, second = _many_shares(row_sums(a * a), row_sums(a * b), row_sums(b * b), alpha)
    return a * first.unsqueeze(1) + b * second.unsqueeze(1)


def on_column_arcs(a: Tensor, b: Tensor, alpha: float) -> Measured:
    """Do the same with each column."""
    a, b = a.double(), b.double()
    aa, ab, bb = yield columns(a, a), columns(a, b), columns(b, b)
    first, second = _many_shares(aa, ab, bb, alpha)
    return a * first + b * second


def middle(vectors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None = None, *, most: int = 0, tolerance: float = 0.0) -> Measured:
    """Make the vector of the weighted mean length in the direction of the weighted mean of directions; or their weighted sum where that is nowhere.

    With steps it is then the direction from which the weighted squares of the angles add up to the least, which `most` steps may reach.
    """
    vectors = [vector.double() if base is None else vector.double() - base for vector in vectors]
    products = yield gram(*vectors)
    return _sum(vectors, _middle_shares(products, tuple(weights), most, tolerance) or weights, base)


def _sum(vectors: Sequence[Tensor], shares: Sequence[float], base: Tensor | None = None) -> Tensor:
    """Add up vectors, each times its share."""
    total = vectors[0] * shares[0]
    for vector, share in zip(vectors[1:], shares[1:], strict=True):
        total += vector * share
    return total if base is None else total + base


def _cosine(aa: float, ab: float, bb: float) -> float:
    """Return the cosine of the angle between two vectors; NaN where one has no direction."""
    if not (0 < aa * bb < math.inf):
        return math.nan
    return max(-1.0, min(1.0, ab / math.sqrt(aa * bb)))  # of equal vectors exactly 1


@functools.lru_cache(maxsize=256)
def _arc_shares(cos: float, alpha: float) -> tuple[float, float] | None:
    """Return what the point at `alpha` of the arc takes of each end; None where no arc joins them: equal, opposite, or without direction."""
    if not -1 + FLAT * FLAT / 2 < cos < 1:
        return None
    angle, sine = scalars.acos(cos), math.sqrt((1 - cos) * (1 + cos))
    return scalars.sin((1 - alpha) * angle) / sine, scalars.sin(alpha * angle) / sine


def _many_shares(aa: Tensor, ab: Tensor, bb: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return what many pairs of vectors give to the points at `alpha` of their arcs, or to their mixtures where no arc joins them."""
    cos = ab.div(elementary.sqrt(aa * bb)).clamp_(-1, 1)
    has_arc = cos.gt(-1 + FLAT * FLAT / 2).logical_and_(cos.lt(1))
    cos = cos.where(has_arc, cos.new_zeros(()))
    angle, sine = _acos_pi(cos), elementary.sqrt((1 - cos) * (1 + cos))
    first, second = elementary.sin_pi(angle * (1 - alpha)).div_(sine), elementary.sin_pi(angle * alpha).div_(sine)
    return first.where(has_arc, cos.new_tensor(1 - alpha)), second.where(has_arc, cos.new_tensor(alpha))


def _acos_pi(cos: Tensor) -> Tensor:
    """Return the angle with this cosine, in half turns, within 4 ulp: four times that whose sine is found by halving it twice."""
    half = (1 - cos.abs()).mul_(0.5)
    square = half.div(elementary.sqrt(1 - half).add_(1).mul_(2))
    series = square * _ASIN[-1]
    for coefficient in reversed(_ASIN[:-1]):
        series.add_(coefficient).mul_(square)
    sine = elementary.sqrt(square)
    angle = series.mul_(sine).add_(sine).mul_(4 / math.pi)
    return angle.where(cos >= 0, 1 - angle)


@functools.lru_cache(maxsize=64)
def _middle_shares(products: Gram, weights: tuple[float, ...], most: int, tolerance: float) -> tuple[float, ...] | None:
    """Return the shares of vectors in their middle; None where directions cancel out.

    The direction starts as that of the weighted sum of directions, and steps along the mean of the tangents to them, as long as their angles,
    until a step is shorter than the tolerance.
    """
    cosines = _cosines(products)
    square = _dot(weights, _times(cosines, weights))
    reach = FLAT * math.fsum(abs(w) for w, row in zip(weights, cosines, strict=True) if any(row))
    if not (all(math.isfinite(x) for row in products for x in row) and square > reach * reach):
        return None
    at = _unit(cosines, weights)
    for _ in range(most):
        step = _step(cosines, weights, at, tolerance)
        length = math.sqrt(max(0.0, _dot(step, _times(cosines, step))))
        if length == 0 or length < tolerance:
            break
        near, far = scalars.cos(length), scalars.sin(length) / length
        at = _unit(cosines, [near * x + far * y for x, y in zip(at, step, strict=True)])
    lengths = [math.sqrt(products[n][n]) for n in range(len(products))]
    mean = _dot(weights, lengths)
    return tuple(share * (mean / length) if length else 0.0 for share, length in zip(at, lengths, strict=True))


def _cosines(products: Gram) -> Gram:
    """Return the dot products of directions; a vector without direction has 0."""
    return tuple(
        tuple(0.0 if math.isnan(cos := _cosine(products[n][n], products[n][m], products[m][m])) else cos for m in range(len(products)))
        for n in range(len(products))
    )


def _step(cosines: Gram, weights: Sequence[float], at: Sequence[float], tolerance: float) -> list[float]:
    """Return the weighted mean of the tangents from a direction to all others, in shares of these."""
    pulls = [0.0] * len(at)
    inward = [max(-1.0, min(1.0, cos)) for cos in _times(cosines, at)]
    known = math.fsum(w for w, row in zip(weights, cosines, strict=True) if any(row))
    for n, cos in enumerate(inward):
        angle, sine = scalars.acos(cos), math.sqrt((1 - cos) * (1 + cos))
        if any(cosines[n]) and angle >= tolerance and sine > FLAT * FLAT:  # what is here, or opposite, pulls nowhere
            pulls[n] = weights[n] / known * (angle / sine)
    along = _dot(pulls, inward)
    return [pull - along * x for pull, x in zip(pulls, at, strict=True)]


def _unit(cosines: Gram, shares: Sequence[float]) -> list[float]:
    length = math.sqrt(_dot(shares, _times(cosines, shares)))
    return [share / length for share in shares]


def _times(matrix: Gram, vector: Sequence[float]) -> list[float]:
    return [_dot(row, vector) for row in matrix]


def _dot(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum(p * q for p, q in zip(x, y, strict=True))
