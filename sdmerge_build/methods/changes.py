"""Owns the arithmetic of adapters' changes: factors become what is added to, or done with, slices of a tensor.

Has never heard of files or names. What a kind of change adds is computed in float64 from `products` and from operations that are rounded correctly,
rounded once to the dtype of the arithmetic, and then added: the same bits on every CPU and for every slicing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from sdmerge_build.methods.deltas import Delta, LowRank, Pair, delta_of, number, pair_of
from sdmerge_build.methods.dora import Decomposed, is_on_input
from sdmerge_build.methods.orthogonal import Butterfly, Rotated

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["Baking", "ChangeError", "Loaded", "cut_of", "prepare"]

Shape = tuple[int, ...]
Rows = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A change with its factors: role → tensor, as it is stored."""

    kind: str
    factors: Mapping[str, Tensor]
    rows: Rows | None
    turned: bool
    strength: float
    scale: float = 1.0  # of what is added before DoRA gives it lengths


class ChangeError(ValueError):
    """A change whose numbers contradict its shapes; `number` tells which of several."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


class Baking:
    """The changes of one tensor, ready to be applied to its slices, by any number of threads."""

    def __init__(self, applied: Sequence[tuple[Rows, _Applied]], width: int) -> None:
        self._applied, self._width = applied, width

    def apply(self, weights: Tensor, start: int) -> Tensor:
        """Apply them, in their order, to whole filters of the tensor, flat, that begin at element `start`."""
        if not weights.numel():
            return weights
        matrix = weights.reshape(-1, self._width)
        first = start // self._width
        is_ours = False
        for (low, count), change in self._applied:
            begin, end = max(low - first, 0), min(low + count - first, len(matrix))
            if begin >= end:
                continue
            changed = change.changed(matrix[begin:end], begin + first - low)
            if len(changed) == len(matrix):
                matrix = changed
            else:
                matrix = matrix if is_ours else matrix.clone()
                matrix[begin:end] = changed
            is_ours = True
        return matrix.reshape(-1)


class _Applied(Protocol):
    """What is done with rows."""

    def changed(self, weights: Tensor, first: int) -> Tensor:
        """Return new rows for rows (n, width) that begin at row `first` of those that the change is about."""


def cut_of(kind: str, shapes: Mapping[str, Shape], shape: Shape, *, turned: bool) -> str:
    """Say where a tensor of this shape may be cut for a change: between `filters`, or `nowhere`.

    Rotations mix the entries of the first dimension, and DoRA on the input has lengths over all of them.
    """
    if turned or kind in {"oft", "boft"}:
        return "nowhere"
    return "nowhere" if "dora_scale" in shapes and is_on_input(shapes["dora_scale"], shape) else "filters"


def prepare(changes: Sequence[Loaded], shape: Shape, dtype: torch.dtype) -> Baking:
    """Prepare changes for a tensor of this shape; arithmetic is in `dtype`, float32 or float64."""
    shape = shape or (1,)
    applied: list[tuple[Rows, _Applied]] = []
    _refuse_contradictions(changes, shape)
    wanted = [change for change in changes if change.strength != 0]
    for is_plain, run in itertools.groupby(wanted, _is_plain):
        if is_plain:
            applied += _stacked(list(run), shape[0], is_wide=dtype == torch.float64)
        else:
            applied += [(_rows(change, shape[0]), _applied(change, shape, is_wide=dtype == torch.float64)) for change in run]
    return Baking(applied, math.prod(shape[1:]))


def _refuse_contradictions(changes: Sequence[Loaded], shape: Shape) -> None:
    """Refuse an IA³ whose factor does not go along the side that it says."""
    for n, change in enumerate(changes):
        if change.kind == "ia3" and not change.turned:
            side = 1 if number(change.factors, "on_input", 0) else 0
            length = _rows(change, shape[0])[1] if not side else (*shape, 1)[1]
            if change.factors["weight"].numel() != length:
                raise ChangeError(f"it has {change.factors['weight'].numel()} factors for the {length} {('outputs', 'inputs')[side]}", n)


def _rows(change: Loaded, height: int) -> Rows:
    return change.rows or (0, height)


def _is_plain(change: Loaded) -> bool:
    return change.kind == "lora" and not change.turned and "dora_scale" not in change.factors


def _stacked(changes: Sequence[Loaded], height: int, *, is_wide: bool) -> Iterator[tuple[Rows, _Applied]]:
    """Make one product of all LoRAs of the same rows; where others stand between them, they are about other rows, or sums just as well."""
    pairs: dict[Rows, list[Pair]] = {}
    for change in changes:
        pairs.setdefault(_rows(change, height), []).append(pair_of(change.factors, change.strength))
    for rows, found in pairs.items():
        yield rows, _Added(LowRank(found, is_wide=is_wide))


def _applied(change: Loaded, shape: Shape, *, is_wide: bool) -> _Applied:
    rows = _rows(change, shape[0])[1]
    if change.turned:
        return _Turned(_applied(replace(change, rows=None, turned=False), (math.prod(shape[1:]), rows), is_wide=is_wide))
    if change.kind == "set":
        return _Replaced(change.factors["weight"], change.strength)
    return _Added(_delta(change, (rows, *shape[1:]), is_wide=is_wide))


def _delta(change: Loaded, shape: Shape, *, is_wide: bool) -> Delta:
    factors, strength = change.factors, change.strength
    match change.kind:
        case "oft":
            return Rotated(factors, shape[0], strength, is_wide=is_wide)
        case "boft":
            return Butterfly(factors, shape[0], strength, is_wide=is_wide)
    if "dora_scale" in factors:
        delta = delta_of(change.kind, factors, shape, change.scale, is_wide=is_wide)
        return Decomposed(delta, factors["dora_scale"], shape, strength, is_wide=is_wide)
    return delta_of(change.kind, factors, shape, strength, is_wide=is_wide)


class _Added:
    """W + Δ: Δ is rounded to the dtype of W, without a negative zero, and then added."""

    def __init__(self, delta: Delta) -> None:
        self._delta = delta

    def changed(self, weights: Tensor, first: int) -> Tensor:
        return self._delta.of(weights, first).to(weights.dtype).add_(0.0).add_(weights)


class _Replaced:
    """W + s · (new - W), and exactly `new` at strength 1."""

    def __init__(self, new: Tensor, strength: float) -> None:
        self._new, self._strength = new, strength

    def changed(self, weights: Tensor, first: int) -> Tensor:
        new = self._new.reshape(-1, weights.shape[1])[first : first + len(weights)]
        if self._strength == 1:
            return new.to(weights.dtype, copy=True)
        added = new.to(torch.float64).sub(weights).mul_(self._strength)
        return added.to(weights.dtype).add_(weights)


class _Turned:
    """A change of the transposed tensor."""

    def __init__(self, change: _Applied) -> None:
        self._change = change

    def changed(self, weights: Tensor, _: int) -> Tensor:
        return self._change.changed(weights.t().contiguous(), 0).t().contiguous()
