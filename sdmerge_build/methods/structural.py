"""Owns the methods that take regions of a model: of its rows, of its sorted values, of its spectrum.

Has never heard of blocks; the arithmetic of spectra lives in `spectra`, which loads torch when a model is merged.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from sdmerge_build.methods import Place, Positive, Ratio, Unit, method

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["crossover", "distribution_crossover", "tensor_sum", "top_k_tensor_sum"]


@method(version=1)
def tensor_sum(
    a: Tensor,
    b: Tensor,
    /,
    *,
    width: Ratio = 0.5,
    offset: Ratio = 0.0,
    dim: Literal["first", "auto"] = "first",
    rounding: Literal["truncate", "round"] = "truncate",
    place: Place,
) -> Tensor:
    """Replace rows by those of another model: `b` in rows `offset * n` to `(offset + width) * n` of `n`, `a` elsewhere.

    width: the share of rows that come from `b`; a negative one reaches to the left of the offset. At 1 the result is `b` whatever the offset.
    offset: where they begin; the region goes on at the first row where it passes the last.
    dim: the rows are entries of the first dimension, or `auto`: of the second where it has more than 100.
    rounding: what becomes of fractions of rows. A tensor without dimensions goes to `b` at width 1, with `round` above 0.5.

    Origin: supermerger "Tensor" (`alpha` is the width, `beta` the offset), and with `auto` "Tensor2".
    Elsewhere: sd-meh `tensor_sum`; Chattiori "TS"; sd-mecha `tensor_sum` rounds. The first three slice by negative indices where width or
        offset is negative; here, as in sd-mecha, the region is taken around. supermerger leaves tensors without dimensions alone, even at 1, and at
        width 1 rounding may leave it a row of `a`.
    """
    width, offset = _canonical(width, offset)
    if width == 0:
        return a
    if width == 1:
        return b
    along = 1 if dim == "auto" and len(place.shape) > 1 and place.shape[1] > 100 else 0
    n = place.shape[along] if place.shape else 1
    low, high, is_inside = _region(width, offset if place.shape else 0.0, n, round if rounding == "round" else int)
    under, over = (a, b) if is_inside else (b, a)
    if low >= high or not place.numel:
        return under
    inner = math.prod(place.shape[along + 1 :])
    wide = (a[:0] + b[:0]).dtype  # of models of two dtypes, as they are computed with in `native`
    return _pasted(under.to(wide, copy=True), over, place.start, n * inner, low * inner, high * inner)


def _canonical(width: float, offset: float) -> tuple[float, float]:
    """Make a region begin in 0…1 and go to the right."""
    if width < 0:
        width, offset = -width, offset + width
    return min(width, 1.0), offset % 1.0


def _region(width: float, offset: float, n: int, whole: Callable[[float], int]) -> tuple[int, int, bool]:
    """Return from where to where of `n` a region reaches; or, with False, from where to where the rest does."""
    if width + offset <= 1:
        return whole(n * offset), whole(n * (width + offset)), True
    return whole(n * (width + offset - 1)), whole(n * offset), False


def _pasted(out: Tensor, source: Tensor, start: int, period: int, low: int, high: int) -> Tensor:
    """Copy what lies at `low` to `high` of every period from one flat slice to another; they begin at position `start` of the tensor."""
    count = len(out)
    head = min(-start % period, count)
    whole = (count - head) // period * period
    for begin, end in ((0, head), (head, head + whole), (head + whole, count)):
        if begin < end:
            at = (start + begin) % period
            columns = slice(max(low - at, 0), max(high - at, 0))
            length = min(end - begin, period)
            out[begin:end].view(-1, length)[:, columns] = source[begin:end].view(-1, length)[:, columns]
    return out


@method(version=1, cut="nowhere")
def top_k_tensor_sum(a: Tensor, b: Tensor, /, *, width: Ratio = 1.0, offset: Ratio = 0.0) -> Tensor:
    """Move values of `a` to where `b` has the values of their rank, among those whose magnitude is of rank `offset * n` to `(offset + width) * n`.

    width: the share of magnitudes that move; a negative one reaches to the left of the offset. At 0 the result is `a`.
    offset: where they begin, counted from the smallest; the region goes on at the smallest where it passes the largest.

    Origin: sd-meh `top_k_tensor_sum` (`alpha` is the width, `beta` the offset).
    Elsewhere: sd-mecha `top_k_tensor_sum`, which is followed in that the magnitudes at both ends belong to the region: sd-meh leaves out
        the lower one. Both sort `a` unstably, which matters to the signs of zeros only.
    """
    width, offset = _canonical(width, offset)
    if width == 0 or not a.numel():
        return a
    low, high, is_inside = _region(width, offset, a.numel(), round)
    flat, values = a.reshape(-1), a.reshape(-1).sort(stable=True).values
    magnitudes = values.abs()
    least, most = (float(magnitudes.kthvalue(k).values) if k > 0 else -1.0 for k in (low, high))
    moves = magnitudes.ge(least).logical_and_(magnitudes.le(most))
    if not is_inside:
        moves.logical_not_()
    order = b.reshape(-1).argsort(stable=True)
    values = values.where(moves, flat[order])
    return values.scatter(0, order, values).view(a.shape)


@method(version=1, cut="nowhere", pinned=True)
def distribution_crossover(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio, beta: Positive = 0.0) -> Tensor:
    """Cross two models over by frequency, values in the order of `c`: `a + irfft(clamp((f - alpha) / beta + 1/2) * rfft(b - a))`.

    alpha: the frequency, of 0 to 1, at which `a` gives way to `b`; the share of `a` in a tensor without dimensions.
    beta: over how wide a band it does; at 0 all at once.

    Origin: sd-meh `distribution_crossover`.
    Elsewhere: sd-meh transforms both models, and orders equal values of `c` as it happens. Here their difference is transformed, so that equal
        values stay as they are, and equal values of `c` keep their order. Without dimensions sd-meh too takes `alpha` as the share of `a`.
    """
    if not a.dim():
        return a * alpha + b * (1 - alpha)
    from sdmerge_build.methods.spectra import crossed_in_order  # noqa: PLC0415  loads torch

    return crossed_in_order(a, b, c, alpha, beta)


@method(version=1, cut="nowhere", pinned=True)
def crossover(a: Tensor, b: Tensor, /, *, alpha: Unit = 0.5, tilt: Ratio = 0.0) -> Tensor:
    """Take low frequencies from `a` and the highest from `b`: `a + irfftn(filter * rfftn(b - a))`.

    alpha: how much of the range of frequencies comes from `b`.
    tilt: how steep the filter is: 0 all at once, 1 and 3 the same share of all frequencies, 2 all at once but the lowest from `b`; in between a
        slope; 4 is 0 again. The frequency is the root of the mean of squares over dimensions, of which those of length 1 count as 0.

    Origin: sd-mecha `crossover`.
    Elsewhere: sd-mecha transforms both models; here their difference is, so that what is equal stays so. At tilt 2 sd-mecha takes `1 - alpha`
        of the frequencies from `b`, unlike just below and above. Tensors without dimensions, and those equal in float16, it mixes by `tilt`;
        here the former are mixed by `alpha`, and the latter are merged as any other.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    turn = tilt % 4
    if not a.dim() or turn in {1, 3}:
        return a * (1 - alpha) + b * alpha
    from sdmerge_build.methods.spectra import crossed  # noqa: PLC0415  loads torch

    return crossed(a, b, alpha, turn)
