"""Owns the methods that look for the middle of several models, by the angles and distances between them.

Has never heard of coordinates: all that is asked of tensors is their Gram matrix, the sums of products of each two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sdmerge_build.methods import Positive, method
from sdmerge_build.methods.consensus import Measured
from sdmerge_build.methods.elementary import sqrt
from sdmerge_build.methods.measures import gram, row_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["geometric_median", "model_stock", "model_stock_filters", "model_stock_rows"]


@method(version=3)
def model_stock(base: Tensor, /, *models: Tensor) -> Measured:
    """Go from `base` towards the models' average, as far as they agree: `base + t * (average - base)`, `t = N * c / (1 + (N - 1) * c)`.

    c is the mean cosine of the angles between each two differences from the base, from 0 to 1. One model alone is the result.

    Origin: D.-H. Jang et al., "Model Stock: All we need is just a few fine-tuned models" (2024).
    Elsewhere: mergekit `model_stock`, which also goes away from the base where c is negative, without bound as c approaches -1 / (N - 1),
        and makes c smaller where a tensor's differences are. sd-mecha `model_stock` is `model_stock_rows` with `pairs = "consecutive"`.
    """
    if len(models) < 2:
        return models[0]
    moved = [model - base for model in models]
    products = yield gram(*moved)
    cosines = [_cosine(products[i][j], products[i][i] * products[j][j]) for i, j in itertools.combinations(range(len(models)), 2)]
    t = _stock(max(0.0, math.fsum(cosines) / len(cosines)), len(models))
    return base + _sum(moved).mul_(t / len(models)) if t else base


@method(version=1, cut="filters")
def model_stock_filters(base: Tensor, /, *models: Tensor) -> Tensor:
    """Do as `model_stock` for each filter by itself: `base + t * (average - base)`, with one t for all weights of an output.

    A filter is an entry of the first dimension. An element of a vector is one: it goes all the way where models moved it to the same side.

    Origin: D.-H. Jang et al., "Model Stock: All we need is just a few fine-tuned models" (2024).
    Elsewhere: mergekit `model_stock` with `filter_wise` is this for matrices; for convolutions and vectors it is `model_stock_rows`.
    """
    return _by_row(base, models, list(itertools.combinations(range(len(models)), 2)))


@method(version=1, cut="rows")
def model_stock_rows(base: Tensor, /, *models: Tensor, pairs: Literal["all", "consecutive"] = "all") -> Tensor:
    """Do as `model_stock` for each row by itself: `base + t * (average - base)`, with one t for each row of the last dimension.

    pairs: the angles that are averaged: between each two differences, or between each and the next in `models`, whose order then matters.

    Origin: mergekit `model_stock` with `filter_wise`.
    Elsewhere: sd-mecha `model_stock` with `pairs = "consecutive"`; neither bounds t, see `model_stock`. A row of a 3×3 convolution has three
        elements: `model_stock_filters` is what the paper means.
    """
    count = len(models)
    return _by_row(base, models, [(n, n + 1) for n in range(count - 1)] if pairs == "consecutive" else list(itertools.combinations(range(count), 2)))


@method(version=3)
def geometric_median(*models: Tensor, eps: Positive = 1e-6, iterations: int = 100) -> Measured:
    """Find the point with the smallest sum of distances to all models, which a stray one hardly moves: `min over x of the sum of |x - models[i]|`.

    eps: a distance counts as at least this: the result may lie on a model.
    iterations: how many steps there are at most.

    Origin: sd-mecha `geometric_median`, by E. Weiszfeld's algorithm (1937).
    Elsewhere: krishnap25 `geom_median`. sd-mecha measures distances in float32.
    """
    if len(models) < 2:
        return models[0]
    shares = _weiszfeld((yield gram(*(model.to(torch.float64) - models[0] for model in models[1:]))), eps, iterations)
    nearest = max(range(len(models)), key=lambda n: shares[n])  # from a stray one, all others would lose their digits
    others = [(model - models[nearest]).mul_(share) for n, (model, share) in enumerate(zip(models, shares, strict=True)) if n != nearest]
    return models[nearest] + _sum(others)


def _cosine(product: float, squares: float) -> float:
    """Return the cosine of the angle between two vectors; 0 if one of them has no direction."""
    return min(1.0, max(-1.0, product / math.sqrt(squares))) if squares > 0 else 0.0


def _stock(cosine: float, count: int) -> float:
    """Return how far to go towards the average, for a cosine that is not negative."""
    return count * cosine / (1 + (count - 1) * cosine)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """Add tensors in their order; takes the first for its own."""
    for term in terms[1:]:
        terms[0].add_(term)
    return terms[0]


def _by_row(base: Tensor, models: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Go towards the average by the angles within each row of a slice (rows, length)."""
    if len(models) < 2:
        return models[0]
    wide = [(model - base).to(torch.float64) for model in models]
    squares = [row_sums(d * d) for d in wide]
    cosines = []
    for i, j in pairs:
        norms = sqrt(squares[i] * squares[j])
        cosines.append((row_sums(wide[i] * wide[j]) / torch.where(norms > 0, norms, 1.0)).clamp_(-1, 1))
    cosine = _sum(cosines).div_(len(pairs)).clamp_(min=0)
    count = len(models)
    t = (cosine / (cosine * (count - 1) + 1)).to(base.dtype)  # N times this, over the N of the average
    return base + _sum([model - base for model in models]).mul_(t.unsqueeze(1))


def _weiszfeld(products: Sequence[Sequence[float]], eps: float, iterations: int) -> list[float]:
    """Return each point's share in the geometric median of points; the first is the origin, `products` is of the others."""
    count = len(products) + 1
    shares = [1 / count] * count
    if not all(math.isfinite(product) for row in products for product in row):
        return shares  # whatever comes of it will not be finite either, and is complained of by name
    distances = _distances(products, shares)
    for _ in range(iterations):
        attractions = [1 / max(distance, eps, 1e-300) for distance in distances]
        shares = [attraction / math.fsum(attractions) for attraction in attractions]
        before, distances = math.fsum(distances), _distances(products, shares)
        if not math.fsum(distances) < before:
            break
    return shares


def _distances(products: Sequence[Sequence[float]], shares: Sequence[float]) -> list[float]:
    """Return the distance of each point from the one that is made of these shares."""
    found = []
    for point in range(len(shares)):
        offset = [(n == point) - share for n, share in enumerate(shares)][1:]
        square = math.fsum(x * y * products[i][j] for i, x in enumerate(offset) for j, y in enumerate(offset))
        found.append(math.sqrt(max(0.0, square)))
    return found
