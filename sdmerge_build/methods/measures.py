"""Owns what a method may ask of a whole tensor while it sees slices of it: sums, counts, extremes, order statistics.

Has never heard of files or threads. A measure takes a partial of a slice, adds those of all chunks of a tensor, and concludes from their sum;
chunks are the same for every run, and nothing depends on the order in which they are measured.

Sums are those of `sums.py`. Order statistics are exact and never sort: they count digits of the numbers' bits, the leading digit first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sdmerge_build.methods.sums import exact_sum, folded, product, sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = [
    "CHUNK",
    "Measure",
    "Partials",
    "answer_alone",
    "answered",
    "chunk_size",
    "columns",
    "count",
    "dot",
    "gram",
    "kth",
    "least",
    "most",
    "row_sums",
    "seen",
    "total",
]

CHUNK = 1 << 18
"""Elements measured at once. Part of what a sum is: another size would be another order of additions."""

T = TypeVar("T")


class Measure(Protocol):
    """What is asked of a tensor, with one slice of it in hand."""

    is_ordered: bool
    """Whether it matters in which order partials are added: then they are in pairs of neighbours, and pairs of pairs. Others are as they come."""

    def partial(self, state: Any) -> Any:
        """Measure the slice, in the round that `state` stands for; None is the first."""

    def added(self, one: Any, other: Any) -> Any:
        """Make one partial of two, of which `one` comes first in the tensor."""

    def joined(self, partial: Any, state: Any) -> tuple[bool, Any]:
        """Conclude from the partial of all chunks: `(True, answer)`, or `(False, state)` when another round is needed."""


class Partials:
    """What was measured of a tensor so far. Chunks come in any order, and what is kept is about as many partials as their number has digits."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._known: dict[tuple[int, int], Any] = {}  # by level and position

    def add(self, measure: Measure, number: int, partial: Any) -> None:
        """Add the partial of a chunk."""
        level, size = 0, self._chunks
        if not measure.is_ordered:
            partial = measure.added(self._known[0, 0], partial) if self._known else partial
            number = size = 0
        while size > 1:
            neighbour = number ^ 1
            if neighbour < size:  # the last of an odd number has none
                if (level, neighbour) not in self._known:
                    break
                other = self._known.pop((level, neighbour))
                partial = measure.added(partial, other) if number < neighbour else measure.added(other, partial)
            level, number, size = level + 1, number // 2, (size + 1) // 2
        self._known[level, number] = partial

    def joined(self, measure: Measure, state: Any) -> tuple[bool, Any]:
        """Conclude from all chunks."""
        [partial] = self._known.values()
        return measure.joined(partial, state)


def dot(x: Tensor, y: Tensor) -> Measure:
    """Ask for the sum of `x * y` over the tensor, as a float."""
    return _Sum(x, y)


def gram(*vectors: Tensor) -> Measure:
    """Ask for the dot products of each two of several slices, as a symmetric matrix of floats: what `dot` of each pair would say, in one go."""
    return _Gram(vectors)


def total(x: Tensor) -> Measure:
    """Ask for the sum of `x` over the tensor, as a float."""
    return _Sum(x, None)


def columns(x: Tensor, y: Tensor) -> Measure:
    """Ask for the sums of `x * y` over the first dimension, as a float64 tensor (rest,); for methods that cut between filters."""
    return _Columns(x, y)


def count(mask: Tensor) -> Measure:
    """Ask how many elements of a bool tensor are true, as an int."""
    return _Count(mask)


def least(x: Tensor) -> Measure:
    """Ask for the smallest element, as a float; NaN where there is any."""
    return _Extreme(x, torch.amin)


def most(x: Tensor) -> Measure:
    """Ask for the largest element, as a float; NaN where there is any."""
    return _Extreme(x, torch.amax)


def kth(x: Tensor, rank: int) -> Measure:
    """Ask for the `rank`-th smallest element, counted from 1, of a tensor without negative elements, as a float. NaN counts as largest."""
    return _Kth(x, rank)


def row_sums(x: Tensor) -> Tensor:
    """Sum the rows of a (rows, length) tensor in an order that is the same everywhere; float64 (rows,)."""
    return folded(x.to(torch.float64).t()).clone()


def chunk_size(cut: str, shape: Sequence[int]) -> int:
    """Return how many elements of a tensor are measured at once: whole rows or filters, whatever else is done with the tensor."""
    grain = {"rows": shape[-1], "filters": math.prod(shape[1:])}.get(cut, 1) if shape else 1
    return max(grain, CHUNK // max(1, grain) * grain)


def seen(flat: Tensor, cut: str, shape: Sequence[int]) -> Tensor:
    """Give a flat slice the shape in which a method with this cut sees it."""
    match cut:
        case "rows":
            return flat.view(-1, shape[-1]) if shape and shape[-1] else flat.view(1, -1)
        case "filters":
            return flat.view(-1, math.prod(shape[1:])) if math.prod(shape[1:]) else flat.view(-1, 1)
        case "nowhere":
            return flat.view(tuple(shape))
    return flat


def answered(made: Iterator[Any], answer: Any) -> Any:
    """Run a measured method to its result; `answer(phase, measures)` gives the answers to what it asks."""
    phase = 0
    try:
        asked = next(made)
        while True:
            answers = answer(phase, asked if isinstance(asked, tuple) else (asked,))
            asked = made.send(answers if isinstance(asked, tuple) else answers[0])  # type: ignore[attr-defined]  # a generator
            phase += 1
    except StopIteration as done:
        return done.value


def answer_alone(_: int, measures: Sequence[Measure]) -> tuple[Any, ...]:
    """Answer what is asked of a tensor that is one chunk."""
    return tuple(_alone(measure) for measure in measures)


def _alone(measure: Measure) -> Any:
    if isinstance(measure, _Kth) and measure.is_small:
        return measure.at_once()
    is_final, state = False, None
    while not is_final:
        is_final, state = measure.joined(measure.partial(state), state)
    return state


class _Sum:
    """The sum of float64 terms: one of every chunk, which `math.fsum` adds up."""

    is_ordered = True

    def __init__(self, x: Tensor, y: Tensor | None) -> None:
        self._x, self._y = x, y

    def partial(self, _: Any) -> list[float]:
        vectors = [self._x] if self._y is None or self._y is self._x else [self._x, self._y]
        return sums(vectors, [(0, None if self._y is None else len(vectors) - 1)])

    def added(self, one: list[float], other: list[float]) -> list[float]:
        return one + other

    def joined(self, partial: list[float], _: Any) -> tuple[bool, float]:
        return True, exact_sum(partial)


class _Gram:
    """Sums of products of each two slices, which are widened once for all pairs."""

    is_ordered = True

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self._vectors = vectors

    def partial(self, _: Any) -> list[list[float]]:
        return [sums(self._vectors, list(itertools.combinations_with_replacement(range(len(self._vectors)), 2)))]

    def added(self, one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
        return one + other

    def joined(self, partial: list[list[float]], _: Any) -> tuple[bool, tuple[tuple[float, ...], ...]]:
        found = iter([exact_sum(terms) for terms in zip(*partial, strict=True)])
        count = len(self._vectors)
        upper = {(n, m): next(found) for n in range(count) for m in range(n, count)}
        return True, tuple(tuple(upper[min(n, m), max(n, m)] for m in range(count)) for n in range(count))


class _Columns:
    """Sums over the first dimension."""

    is_ordered = True

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y

    def partial(self, _: Any) -> Tensor:
        return folded(product(self._x, self._y)).clone()

    def added(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def joined(self, partial: Tensor, _: Any) -> tuple[bool, Tensor]:
        return True, partial


class _Count:
    """How many are true."""

    is_ordered = False

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def partial(self, _: Any) -> int:
        return int(torch.count_nonzero(self._mask))

    def added(self, one: int, other: int) -> int:
        return one + other

    def joined(self, partial: int, _: Any) -> tuple[bool, int]:
        return True, partial


class _Extreme:
    """The smallest or the largest."""

    is_ordered = False

    def __init__(self, x: Tensor, extreme: Any) -> None:
        self._x, self._extreme = x, extreme

    def partial(self, _: Any) -> Tensor:
        return self._extreme(self._x.reshape(-1), 0)  # type: ignore[no-any-return]

    def added(self, one: Tensor, other: Tensor) -> Tensor:
        return self._extreme(torch.stack([one, other]), 0)  # type: ignore[no-any-return]

    def joined(self, partial: Tensor, _: Any) -> tuple[bool, float]:
        return True, partial.item()


@functools.cache
def _digits(dtype: torch.dtype) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the whole numbers that a dtype's bits are read as, and where their digits of sixteen bits begin, the leading one first."""
    return {
        torch.float16: (torch.int16, (0,)),
        torch.bfloat16: (torch.int16, (0,)),
        torch.float32: (torch.int32, (16, 0)),
        torch.float64: (torch.int64, (48, 32, 16, 0)),
    }[dtype]


_FEW = 1 << 15


class _Kth:
    """An order statistic: the bits of numbers that are not negative are in the order of the numbers."""

    is_ordered = False

    def __init__(self, x: Tensor, rank: int) -> None:
        self._whole, self._shifts = _digits(x.dtype)
        self._dtype, self._rank = x.dtype, rank
        self._bits = x.contiguous().view(-1).view(self._whole)

    @property
    def is_small(self) -> bool:
        """Tell whether looking through the numbers is quicker than counting 65536 digits."""
        return len(self._bits) <= _FEW

    def at_once(self) -> float:
        """Find the number in a tensor that is one chunk."""
        return self._number(int(torch.kthvalue(self._bits, self._rank).values))

    def partial(self, state: tuple[int, int, int] | None) -> Tensor:
        """Count the digits of this round, among the numbers that begin with the digits found so far."""
        done, prefix, _ = state or (0, 0, 0)
        shift = self._shifts[done]
        bits = self._bits
        if done:
            bits = bits[(bits >> (shift + 16)) == prefix]
        digits = (bits >> shift if shift else bits).to(torch.int32) & 0xFFFF
        return torch.bincount(digits, minlength=1 << 16)

    def added(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def joined(self, counts: Tensor, state: tuple[int, int, int] | None) -> tuple[bool, Any]:
        done, prefix, below = state or (0, 0, 0)
        if not 1 <= self._rank - below <= int(counts.sum()):
            message = f"BUG: rank {self._rank} of {int(counts.sum()) + below} elements"
            raise AssertionError(message)
        running = counts.cumsum(0)
        digit = int(torch.searchsorted(running, self._rank - below))
        below += int(running[digit] - counts[digit])
        prefix = prefix << 16 | digit
        if done + 1 < len(self._shifts):
            return False, (done + 1, prefix, below)
        return True, self._number(prefix)

    def _number(self, bits: int) -> float:
        return torch.tensor([bits], dtype=torch.int64).to(self._whole).view(self._dtype).item()
