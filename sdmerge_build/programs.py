"""Owns programs: how one tensor of every output is made, value by value, from tensors of files.

Has never heard of torch, threads or the order in which tensors are worked on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdmerge_build.check import Checked, Operation
from sdmerge_build.files import Snapshot
from sdmerge_build.methods import Method
from sdmerge_build.plan import Plan
from sdmerge_build.tensorfile import Header

__all__ = ["SLICE", "Apply", "Compiler", "Emit", "Fit", "Leaf", "Load", "Program", "Round", "Value", "args_of", "grain_of"]

SLICE = 128 << 10
"""Elements evaluated at once. Measured: a third of this is slower for Python's overhead, eight times this for missing the cache."""

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


Value = Load | Apply | Round | Fit


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
        return max(self.grain, SLICE * _USUALLY_ALIVE // max(_USUALLY_ALIVE, most) // self.grain * self.grain)


class Compiler:
    """Turns steps into programs, tensor by tensor."""

    def __init__(self, plan: Plan, checked: Checked, keys: Mapping[str, str], leaves: Mapping[str, Leaf]) -> None:
        self._plan = plan
        self._checked = checked
        self._keys = keys
        self._leaf_of = leaves
        self._ids: dict[str, int] = {}
        self.leaves: list[Leaf] = []

    def program(self, tensor: str, targets: Sequence[tuple[int, str, int]]) -> Program:
        """Compile one tensor for `targets`: output, whose tensor it is, and the position of its first byte there. All have one shape."""
        values: list[Value] = []
        made: dict[str, int] = {}  # tensor key → value
        emits = [Emit(output, self._value(name, tensor, values, made), start) for output, name, start in targets]
        shape = self._checked.tensors[targets[0][1]][tensor].shape
        return Program(tensor, shape, tuple(values), tuple(emits), _last_used(values, emits), grain_of(values, math.prod(shape)))

    def _value(self, wanted: str, tensor: str, values: list[Value], made: dict[str, int]) -> int:
        """Append whatever it takes to make one tensor of a source or step, and return its position. Deep chains need no deep stack."""
        stack = [wanted]
        while stack:
            name = stack[-1]
            key = self._keys[name]
            if key in made:
                stack.pop()
            elif name in self._leaf_of:
                made[key] = _append(values, self._load(name, tensor))
                stack.pop()
            else:
                operation, inputs = self._checked.operations[name][tensor], self._plan.steps[name].inputs
                lacking = [inputs[n] for n in operation.reads if self._keys[inputs[n]] not in made]
                if lacking:
                    stack += lacking
                    continue
                args = [made[self._keys[i]] if n in operation.reads else None for n, i in enumerate(inputs)]
                made[key] = self._operation(name, tensor, operation, args, values)
                stack.pop()
        return made[self._keys[wanted]]

    def _load(self, name: str, tensor: str) -> Load:
        leaf = self._leaf_of[name]
        if name not in self._ids:
            self._ids[name] = len(self.leaves)
            self.leaves.append(leaf)
        spec = leaf.header.tensors[tensor]
        return Load(self._ids[name], leaf.header.data_start + spec.offset, spec.dtype, spec.numel)

    def _operation(self, name: str, tensor: str, operation: Operation, args: list[int | None], values: list[Value]) -> int:
        """Append what one step does to one tensor, and return the position of its result."""
        step = self._plan.steps[name]
        saturates = step.nonfinite == "saturate"
        if operation.copied is not None:
            arg = args[operation.copied]
            assert arg is not None, "BUG: a copied tensor is read"
            return _append(values, Round(arg, operation.dtype, saturates))
        shapes = [self._checked.tensors[i][tensor].shape for i in step.inputs]
        rest = None
        if operation.area != operation.shape:
            rest = args[shapes.index(operation.shape)]
            assert rest is not None, "BUG: the tensor that is pasted into is read"
        for n, arg in enumerate(args):
            if arg is not None and shapes[n] != operation.area:
                args[n] = _append(values, Fit(arg, shapes[n], operation.area, None))
        apply = Apply(step.method, tuple(args), operation.params, step.compute, operation.dtype, operation.area, saturates, name)
        made = _append(values, apply)
        if rest is None:
            return made
        under = _append(values, Round(rest, operation.dtype, saturates))
        return _append(values, Fit(made, operation.area, operation.shape, under))


def _append(values: list[Value], value: Value) -> int:
    values.append(value)
    return len(values) - 1


def grain_of(values: Sequence[Value], numel: int) -> int:
    """Find how many elements no slice may divide. Multiples of eight keep every dtype aligned."""
    grain = 8
    for value in values:
        if isinstance(value, Fit):
            return max(1, numel)
        if isinstance(value, Apply) and value.shape:
            row = {"rows": value.shape[-1], "filters": math.prod(value.shape[1:])}.get(value.method.cut, 1)
            grain = math.lcm(grain, max(1, row))
    return grain


def _last_used(values: Sequence[Value], emits: Sequence[Emit]) -> tuple[tuple[int, ...], ...]:
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
        case Round():
            return {value.arg}
        case Fit():
            return {value.arg} if value.under is None else {value.arg, value.under}
    return set()
