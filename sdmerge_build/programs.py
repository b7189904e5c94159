"""Owns programs: how one tensor of every output is made, value by value, from tensors of files.

Has never heard of torch, threads or the order in which tensors are worked on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdmerge_build.adapters import Change
from sdmerge_build.files import Snapshot
from sdmerge_build.methods import Method
from sdmerge_build.tensorfile import Header

__all__ = [
    "SLICE",
    "Alteration",
    "Apply",
    "Bake",
    "Count",
    "Emit",
    "Fit",
    "Leaf",
    "Load",
    "Move",
    "Program",
    "Round",
    "Value",
    "args_of",
    "grain_of",
    "last_used",
    "loads_of",
    "moves_of",
]

SLICE = 256 << 10
"""Elements evaluated at once. Measured: a third of this is slower for Python's overhead, eight times this for missing the cache."""

_BAKED = 1 << 19
"""Elements evaluated at once where factors of adapters are multiplied: products of few rows read the other factor too often."""

_REACHING = 1 << 20
"""Elements evaluated at once where a method sees neighbours of a slice too: these are evaluated again with the next slice."""

_USUALLY_ALIVE = 8
"""Values of a program that may be alive at once before slices shrink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A file that tensors are read from: a source, or an artifact already in the store."""

    name: str
    path: Path
    header: Header
    snapshot: Snapshot | None = None  # how a source was when its digests were learned; what the store holds does not change


@dataclass(frozen=True, slots=True)
class Load:
    """Read a tensor of a leaf, as it is in the file; `start` is its first byte's position."""

    leaf: int
    start: int
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply a method to earlier values, and round once to `dtype`. A value the method takes nothing of is None."""

    method: Method
    args: tuple[int | None, ...]
    params: Mapping[str, Any]
    compute: str
    dtype: str
    shape: tuple[int, ...]
    saturates: bool  # whether what is too large becomes the largest number
    step: str  # whose survey the method may ask for

    @property
    def cut(self) -> str:
        """Say where the tensor may be cut."""
        return self.method.cut

    @property
    def is_local(self) -> bool:
        """Tell whether slices of its arguments are enough for a slice of its result."""
        return self.cut != "nowhere" and not self.method.reach


@dataclass(frozen=True, slots=True)
class Alteration:
    """A change of an adapter, with its factors as they lie in a leaf: role → where, and its shape."""

    adapter: str
    change: Change
    factors: Mapping[str, tuple[Load, tuple[int, ...]]]
    strength: float


@dataclass(frozen=True, slots=True)
class Bake:
    """Apply changes of adapters to an earlier value, one after the other, and round once to `dtype`."""

    arg: int
    alterations: tuple[Alteration, ...]
    compute: str
    dtype: str
    shape: tuple[int, ...]
    saturates: bool
    cut: str

    @property
    def is_local(self) -> bool:
        """Tell whether a slice of its argument is enough for a slice of its result."""
        return self.cut != "nowhere"


@dataclass(frozen=True, slots=True)
class Round:
    """Take an earlier value as another dtype, rounded once; exactly, when the dtype is its own."""

    arg: int
    dtype: str
    saturates: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """Take of an earlier value what two shapes have in common, and the rest from `under`, or zeros."""

    arg: int
    shape: tuple[int, ...]  # of `arg`
    to: tuple[int, ...]
    under: int | None


@dataclass(frozen=True, slots=True)
class Count:
    """Count from 0, in whole numbers of 64 bits."""


@dataclass(frozen=True, slots=True)
class Move:
    """Take elements that inner programs make, one run after the other; or all of one, turned."""

    runs: tuple[tuple[int, int, int], ...]  # the inner program, the first element, and how many
    turned: tuple[int, ...]  # the shape of what is turned; nothing where nothing is
    dtype: str


Value = Load | Apply | Bake | Round | Fit | Count | Move


@dataclass(frozen=True, slots=True)
class Emit:
    """Write a value into an output; `start` is the tensor's first byte's position in the data section."""

    output: int
    value: int
    start: int


@dataclass(frozen=True, slots=True)
class Program:
    """How one tensor of every output is made: values in order, each referring to earlier ones by position."""

    tensor: str
    shape: tuple[int, ...]
    values: tuple[Value, ...]
    emits: tuple[Emit, ...]
    last_used: tuple[tuple[int, ...], ...]
    """For each value, the earlier ones that nothing needs any more once it is made."""
    grain: int
    """Elements that no slice may divide; the last slice may be short."""

    @property
    def numel(self) -> int:
        """Count the tensor's elements."""
        return math.prod(self.shape)

    @property
    def slice_size(self) -> int:
        """Return how many elements to evaluate at once: fewer where many values are alive, so that memory does not grow with them."""
        alive = most = 0
        for dead in self.last_used:
            alive += 1
            most = max(most, alive)
            alive -= len(dead)
        wanted = SLICE * _USUALLY_ALIVE // max(_USUALLY_ALIVE, most)
        if any(isinstance(value, Bake) for value in self.values):
            wanted = max(wanted, _BAKED)
        if any(isinstance(value, Apply) and value.method.reach for value in self.values):
            wanted = max(wanted, _REACHING)
        return max(self.grain, wanted // self.grain * self.grain)


def grain_of(values: Sequence[Value], numel: int) -> int:
    """Find how many elements no slice may divide. Multiples of eight keep every dtype aligned."""
    grain = 8
    for value in values:
        if isinstance(value, Fit) or (isinstance(value, Move) and value.turned):
            return max(1, numel)
        if isinstance(value, (Apply, Bake)) and value.shape:
            row = {"rows": value.shape[-1], "filters": math.prod(value.shape[1:])}.get(value.cut, 1)
            grain = math.lcm(grain, max(1, row))
    return grain


def last_used(values: Sequence[Value], emits: Sequence[Emit]) -> tuple[tuple[int, ...], ...]:
    """Find for each value which earlier ones it is the last to need; what is emitted is needed to the end."""
    needed = {emit.value for emit in emits}
    dead: list[tuple[int, ...]] = []
    for value in reversed(values):
        args = args_of(value)
        dead.append(tuple(sorted(args - needed)))
        needed |= args
    return tuple(reversed(dead))


def args_of(value: Value) -> set[int]:
    """List the earlier values that one is made of."""
    match value:
        case Apply():
            return {arg for arg in value.args if arg is not None}
        case Round() | Bake():
            return {value.arg}
        case Fit():
            return {value.arg} if value.under is None else {value.arg, value.under}
    return set()


def moves_of(program: Program) -> set[int]:
    """List the inner programs that one takes elements of."""
    return {inner for value in program.values if isinstance(value, Move) for inner, _, _ in value.runs}


def loads_of(value: Value) -> list[Load]:
    """List what is read from files for a value."""
    match value:
        case Load():
            return [value]
        case Bake():
            return [load for alteration in value.alterations for load, _ in alteration.factors.values()]
    return []
