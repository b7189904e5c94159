"""Owns the methods that add a part of a difference: what points a certain way, what is smooth, what is common; and limits to how far a model may go.

Has never heard of dtypes or blocks. Whatever divides by the size of changes says what it does where nothing changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sdmerge_build.methods import Place, Positive, Ratio, Unit, method
from sdmerge_build.methods.elementary import power, sqrt
from sdmerge_build.methods.measures import row_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["add_opposite", "add_strict_opposite", "clamp", "extract", "smooth_add", "train_difference"]

_BLOCK = 1 << 16  # elements that are filtered at once: the lists of their neighbours stay in a cache

_GAUSSIAN = (0.39894346935609776, 0.24197144565660073, 0.0539911274207044, 0.0044318616200312655, 0.00013383062461474175)
"""e^(-k² / 2) for k = 0…4, over the sum of all nine."""

_REACH = len(_GAUSSIAN) - 1


@method(version=1)
def train_difference(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0) -> Tensor:
    """Add what `b` learned since `c`, less where `b` is near `a`: `a + 1.8 * alpha * (b - c) * |b - a| / (|b - c| + |b - a|)`.

    alpha: how much of it; the quotient is 0 where all three are equal.

    Origin: supermerger "trainDifference".
    Elsewhere: Chattiori "TD"; sd-mecha `train_difference_mask` as the ratio of `add_difference`.
    """
    if alpha == 0:
        return a
    learned, apart = b - c, (b - a).abs()
    both = learned.abs() + apart
    return a + learned * (apart / both.masked_fill_(both == 0, 1)) * (1.8 * alpha)


@method(version=1)
def add_opposite(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0) -> Tensor:
    """Add what `b` learned, less where `a` learned the same: `a + 2 * alpha * (b - c) * |a - b| / (|a - b| + |a + b - 2 * c|)`.

    alpha: how much of it; the quotient is 0 where all three are equal, ½ where one of `a` and `b` is as `c`.

    Origin: sd-mecha `add_opposite_mask`, as the ratio of `add_difference`.
    Elsewhere: nowhere.
    """
    if alpha == 0:
        return a
    x, y = a - c, b - c
    apart = (a - b).abs()
    both = apart + (x + y).abs()
    return a + y * (apart / both.masked_fill_(both == 0, 1)) * (2 * alpha)


@method(version=1)
def add_strict_opposite(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0) -> Tensor:
    """Add what `b` learned where `a` learned the opposite: `a + 2 * alpha * (b - c) * max(0, -x * y / max(|x|, |y|)²)`, `x = a - c`, `y = b - c`.

    alpha: how much of it; the quotient is 0 where all three are equal.

    Origin: sd-mecha `add_strict_opposite_mask`, as the ratio of `add_difference`.
    Elsewhere: sd-mecha divides products that vanish when both changes are tiny, and so drops those.
    """
    if alpha == 0:
        return a
    x, y = a - c, b - c
    larger = x.abs().maximum(y.abs())
    larger.masked_fill_(larger == 0, 1)
    opposed = (x / larger) * (y / larger)
    return a + y * opposed.masked_fill_(opposed > 0, 0) * (-2 * alpha)


@method(version=1, cut="rows")
def extract(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Unit = 0.5, beta: Unit = 0.0, gamma: Positive = 1.0) -> Tensor:
    """Add to `a` what is common in two models, or what is not: `a + ((1 - alpha) * x + alpha * y) * ((1 - beta) * d + beta * (1 - d))`.

    alpha: how much of `y = c - a` beside `x = b - a`.
    beta: 0 adds what the models have in common, 1 what sets them apart.
    gamma: how strictly: `d = ((cos + 1) / 2)^gamma`, where `cos` is the cosine of `x` and `y` along the last dimension, 0 where either is 0.

    Origin: supermerger "extract".
    Elsewhere: an older supermerger has two models and another formula. As there, rows of a convolution are those of its kernels.
    """
    x, y = b - a, c - a
    norm = sqrt(_row_products(x, x)) * sqrt(_row_products(y, y))
    cosine = (_row_products(x, y) / norm.masked_fill_(norm == 0, 1)).clamp_(-1, 1)
    common = power((cosine + 1) * 0.5, gamma)
    weight = common * (1 - beta) + (1 - common) * beta
    return a + (x * (1 - alpha) + y * alpha) * weight.to(a.dtype)[:, None]


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    return row_sums(x.to(torch.float64).mul(y))


@method(version=1)
def clamp(a: Tensor, /, *models: Tensor, stiffness: Unit = 0.0) -> Tensor:
    """Keep `a` between the other models, weight by weight: `min(max(a, low), high)`.

    stiffness: 0 lets `low` and `high` be the smallest and the largest of `models`; 1 makes them the two that are next to their mean, on either
        side of it; what is between is a mixture of both.

    Origin: sd-mecha `clamp`; sd-meh `weights_clip` without `stiffness`.
    Elsewhere: sd-meh clips to its models A and B after any method, here a step of its own.
    """
    if not models:
        return a
    bounds = [model + 0.0 for model in models]  # of 0 and -0 each CPU has another maximum
    low, high = bounds[0], bounds[0]
    for bound in bounds[1:]:
        low, high = low.minimum(bound), high.maximum(bound)
    if stiffness:
        low, high = _stiff(bounds, low, high, stiffness)
    return (a + 0.0).maximum(low).minimum(high)


def _stiff(bounds: Sequence[Tensor], low: Tensor, high: Tensor, stiffness: float) -> tuple[Tensor, Tensor]:
    """Move both bounds towards the models next to the mean."""
    mean = bounds[0].to(torch.float64)
    for bound in bounds[1:]:
        mean = mean + bound
    mean = mean / len(bounds)
    below, above = low, high
    for bound in bounds:
        below = bound.where((bound >= below) & (bound <= mean), below)
        above = bound.where((bound <= above) & (bound >= mean), above)
    return low + (below - low) * stiffness, high + (above - high) * stiffness  # nothing moves where both are one


@method(version=1, cut="filters", reach=1 + _REACH)
def smooth_add(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0, place: Place) -> Tensor:
    """Add what `b` learned since `c`, smoothed: `a + alpha * gaussian(median(b - c))`.

    alpha: how much of it. Each weight of the difference becomes the median of its neighbourhood of 3 in every dimension, then the mean of one of 9,
        by a Gaussian of deviation 1; beyond an edge the tensor goes on as its mirror image.

    Origin: supermerger "smoothAdd".
    Elsewhere: supermerger "smoothAdd MT"; Chattiori "sAD". They round after every dimension of the Gaussian, here once midway and once at the end.
        What they store is of 32 bits.
    """
    if alpha == 0 or not a.numel():
        return a
    order = _filtering_order(place.shape)
    if not order:
        return a + (b - c) * alpha
    sizes = [len(a) if dimension == 0 else place.shape[dimension] for dimension in sorted(order)]
    axes = [sorted(order).index(dimension) for dimension in order]
    blurred = _smoothed(b.view(sizes).permute(axes), c.view(sizes).permute(axes))
    return a + blurred.permute([axes.index(axis) for axis in range(len(axes))]).reshape(a.shape).mul_(alpha)


def _smoothed(b: Tensor, c: Tensor) -> Tensor:
    """Filter the difference of two tensors, in blocks."""
    smooth = b.new_empty(b.shape)
    for rows in _blocks(b):
        middle = _medians(_near(b, 0, rows, 1) - _near(c, 0, rows, 1) + 0.0)  # of 0 and -0 each CPU has another minimum
        for dimension in range(1, middle.dim()):
            middle = _blurred(_padded(middle, dimension, _REACH), dimension)
        smooth[rows] = middle.to(b.dtype)
    blurred = torch.empty_like(smooth)
    for rows in _blocks(b):
        blurred[rows] = _blurred(_near(smooth, 0, rows, _REACH), 0).to(b.dtype)
    return blurred


def _filtering_order(shape: Sequence[int]) -> list[int]:
    """Return the dimensions so that blocks of the first one are small, and the last one is long: the inner loops run along it.

    It is part of the result, which is rounded before the first one is blurred. Along a dimension of 1, neither filter changes anything.
    """
    by_size = sorted((dimension for dimension, size in enumerate(shape) if size > 1), key=lambda dimension: shape[dimension])
    return [*by_size[-2:-1], *by_size[:-2], by_size[-1]] if by_size else []


def _blocks(x: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK * len(x) // x.numel())
    return (slice(start, min(len(x), start + size)) for start in range(0, len(x), size))


def _near(x: Tensor, dimension: int, part: slice, reach: int) -> Tensor:
    """Return a part of a tensor with what is around it, mirrored beyond the edges, as often as it takes."""
    count = x.shape[dimension]
    at = torch.arange(part.start - reach, part.stop + reach).remainder(2 * count)
    return x.index_select(dimension, at.minimum(2 * count - 1 - at))


def _padded(x: Tensor, dimension: int, reach: int) -> Tensor:
    return _near(x, dimension, slice(0, x.shape[dimension]), reach)


def _blurred(x: Tensor, dimension: int) -> Tensor:
    """Take weighted means of nine neighbours along a dimension, which shrinks by eight."""
    count = x.shape[dimension] - 2 * _REACH
    x = x.to(torch.float64)
    blurred = x.narrow(dimension, _REACH, count) * _GAUSSIAN[0]
    for reach in range(_REACH, 0, -1):
        pair = x.narrow(dimension, _REACH - reach, count) + x.narrow(dimension, _REACH + reach, count)
        blurred = blurred + pair * _GAUSSIAN[reach]
    return blurred


def _medians(x: Tensor) -> Tensor:
    """Return the medians of neighbourhoods of 3 in every dimension; the first one is padded already.

    Neighbourhoods are sorted by networks of minima and maxima, one dimension after the other, so that neighbours share most of the work.
    """
    for dimension in range(1, x.dim()):
        x = _padded(x, dimension, 1)
    ranks = [x]  # of sorted neighbourhoods in the dimensions so far, the smallest first
    for dimension in range(1, x.dim()):
        first, second, third = _shifted(ranks, dimension)
        ranks = _merged(_merged(first, second), third)
    first, second, third = _shifted(ranks, 0)
    return _middle(_merged(first, second), third)


def _shifted(ranks: Sequence[Tensor], dimension: int) -> list[list[Tensor]]:
    count = ranks[0].shape[dimension] - 2
    return [[x.narrow(dimension, shift, count) for x in ranks] for shift in range(3)]


def _merged(xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
    """Merge two sorted lists, element by element of their tensors. K. E. Batcher, "Sorting networks and their applications" (1968)."""
    if not xs or not ys:
        return xs or ys
    if len(xs) == len(ys) == 1:
        return [xs[0].minimum(ys[0]), xs[0].maximum(ys[0])]
    even, odd = _merged(xs[::2], ys[::2]), _merged(xs[1::2], ys[1::2])
    merged = even[:1]
    for x, y in zip(odd, even[1:], strict=False):  # either may have one more
        merged += [x.minimum(y), x.maximum(y)]
    return [*merged, *odd[len(even) - 1 :], *even[len(odd) + 1 :]]


def _middle(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Return the median of two sorted lists, one twice as long: the least number that i of one and rank - i of the other do not exceed."""
    rank = (len(xs) + len(ys) + 1) // 2
    found = xs[rank - 1]
    for taken, y in enumerate(ys, 1):
        found = found.minimum(xs[rank - taken - 1].maximum(y))
    return found
