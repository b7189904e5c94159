"""Owns products of matrices that have the same bits on every CPU, for any number of threads and any slicing of rows.

Has never heard of adapters. A BLAS adds in an order of its own, and some fuse multiplications with additions; here neither can show, as nothing is
ever rounded inside it. Rows of the left matrix and columns of the right one are rounded to multiples of a unit of their own, a power of two, chosen
so that a row has at most the length 2^26.5 in its units, and a column likewise. By the inequality of Cauchy and Schwarz no sum of products, over any
part of a row and a column, then exceeds 2^53 units: every partial sum is a whole number that float64 holds exactly, in whatever order it was made.

What rounding to units takes away is 2^-27 of a row's or column's length per element, less than what a product in float32 loses. float64 has two
such parts on each side, and three products: the best, and the two mixed ones.

Origin: K. Ozaki, T. Ogita, S. Oishi, S. M. Rump, "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication and its applications" (2012), which bounds sums by the largest elements; lengths leave more bits, and need no blocks for long rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge_build.methods.measures import row_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["Multiplier", "exponents", "powers", "product"]

_BIAS = 1022  # a float64 with the exponent bits e is below 2^(e - 1022)
_BLOCK = 1024  # elements of a row that have one unit: the error of a sum grows with the root of their number
_COLUMNS = 512  # that are rounded at once
_MARGIN = 1 + 2.0**-8  # for what rounding adds to a length, and for the last bits of sums of squares


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices, or batches of them, of float32 or float64; narrower dtypes count as float32.

    Where a row of `left` or a column of `right` has an element that is not finite, that of the product is NaN. There is no negative zero.
    """
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return Multiplier(right, is_wide=dtype == torch.float64).of(left).to(dtype).add_(0.0)


class Multiplier:
    """The right side of products, prepared once for many slices of the left side."""

    def __init__(self, right: Tensor, *, is_wide: bool) -> None:
        """Prepare (…, k, n); `is_wide` asks for the precision and range of float64, else for those of float32, squared."""
        self._blocks = [_Block(block, is_wide=is_wide) for block in torch.split(right, _BLOCK, -2)]

    def of(self, left: Tensor) -> Tensor:
        """Multiply (…, m, k) with it; float64, so that nothing is rounded twice, and possibly with negative zeros."""
        first, *others = (block.of(part) for block, part in zip(self._blocks, torch.split(left, _BLOCK, -1), strict=True))
        for other in others:
            first.add_(other)
        return first


class _Block:
    """A product that is one of the processor's."""

    def __init__(self, right: Tensor, *, is_wide: bool) -> None:
        self._is_wide = is_wide
        x = right.to(torch.float64)
        self._extents = None
        if is_wide:
            self._extents = _extents(x, -2)
            x = _scaled(x, self._extents.neg())
        self._parts, self._spoilt = _split(x, -2, 2) if is_wide else _split_by_columns(x)

    def of(self, left: Tensor) -> Tensor:
        x = left.to(torch.float64)
        if not self._is_wide or self._extents is None:
            [rounded], spoilt = _split(x, -1, 1)
            return self._marked(torch.matmul(rounded, self._parts[0]), spoilt)
        extents = _extents(x, -1)
        (large, small), spoilt = _split(_scaled(x, extents.neg()), -1, 2)
        found = torch.matmul(large, self._parts[1])
        found.add_(torch.matmul(small, self._parts[0])).add_(torch.matmul(large, self._parts[0]))
        total = extents + self._extents
        third = total // 3  # not all at once: what is in range at the end must be in between
        for part in (third, third, total - third * 2):
            found.mul_(powers(part))
        return self._marked(found, spoilt)

    def _marked(self, found: Tensor, spoilt: Tensor | None) -> Tensor:
        for mask in (spoilt, self._spoilt):
            if mask is not None:
                found.masked_fill_(mask, torch.nan)  # one NaN, not each CPU's own
        return found


def _split(x: Tensor, dim: int, count: int) -> tuple[list[Tensor], Tensor | None]:
    """Divide a float64 tensor into parts that are multiples of units, the largest first, and tell which rows or columns are not finite."""
    parts: list[Tensor] = []
    spoilt = None
    for n in range(count):
        squares = _squares(x, dim)
        if n == 0:
            spoilt = squares.isfinite().logical_not_()
        rounder = _rounder(squares)
        parts.append(x.add(rounder).sub_(rounder))
        if n + 1 < count:
            x = x - parts[-1]  # exact
    return parts, spoilt if spoilt is not None and bool(spoilt.any()) else None


def _split_by_columns(x: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Do the same with the one part of each column, some columns at a time: what lies between takes several times as much memory."""
    whole, masks = torch.empty(x.shape, dtype=torch.float64), []
    for columns, result in zip(torch.split(x, _COLUMNS, -1), torch.split(whole, _COLUMNS, -1), strict=True):
        [part], spoilt = _split(columns.to(torch.float64), -2, 1)
        result.copy_(part)
        masks.append(spoilt if spoilt is not None else torch.zeros((*columns.shape[:-2], 1, columns.shape[-1]), dtype=torch.bool))
    mask = torch.cat(masks, -1)
    return [whole], mask if bool(mask.any()) else None


def _squares(x: Tensor, dim: int) -> Tensor:
    """Sum the squares along a dimension, in an order that is the same everywhere; the dimension stays, with one entry."""
    along = (x * x).movedim(dim, 0)
    return row_sums(along.flatten(1).t()).view(along.shape[1:]).unsqueeze(dim)


def _rounder(squares: Tensor) -> Tensor:
    """Return what, added and subtracted, rounds numbers with this sum of squares to multiples of the smallest unit that they may have.

    It is 1.5 · 2^52 units; from there to 2^53 units float64 holds multiples of the unit and nothing between. A sum of zeros has a unit as well.
    """
    exponent = (squares * _MARGIN).view(torch.int64).bitwise_right_shift_(52).sub_(_BIAS)  # squares are below 2^exponent
    unit = exponent.sub_(52).bitwise_right_shift_(1)  # and at most 2^53 units²: the least whole number that is not below (exponent - 53) / 2
    return unit.add_(52 + 1023).bitwise_left_shift_(52).add_(1 << 51).view(torch.float64)


def _extents(x: Tensor, dim: int) -> Tensor:
    if not x.shape[dim]:
        return torch.zeros_like(_squares(x, dim), dtype=torch.int64)
    return exponents(x.abs().amax(dim, keepdim=True))


def exponents(x: Tensor) -> Tensor:
    """Return whole numbers whose powers of two are above float64 numbers that are not negative, and at most twice as large; -1022 at least."""
    return x.view(torch.int64).bitwise_right_shift(52).sub_(_BIAS)


def _scaled(x: Tensor, whole: Tensor) -> Tensor:
    return (x * powers(_half(whole))).mul_(powers(_other_half(whole)))


def _half(whole: Tensor) -> Tensor:
    return whole >> 1


def _other_half(whole: Tensor) -> Tensor:
    return whole - (whole >> 1)


def powers(whole: Tensor) -> Tensor:
    """Return 2 to these whole numbers, of at most ±1022."""
    return whole.add(1023).bitwise_left_shift_(52).view(torch.float64)
