"""Owns the compilation of steps: from what the check found to programs, tensor by tensor.

Has never heard of torch, threads or the order in which tensors are worked on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sdmerge_build.adapters import TAKEN
from sdmerge_build.architectures.diffusers import SWAPPED, TRANSPOSED
from sdmerge_build.architectures.made import COUNTED, Made
from sdmerge_build.check import Checked, Operation, Strength
from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.methods.changes import cut_of
from sdmerge_build.plan import Plan
from sdmerge_build.programs import Alteration, Apply, Bake, Count, Emit, Fit, Leaf, Load, Move, Program, Round, Value, grain_of, last_used

__all__ = ["Compiler"]


class Compiler:
    """Turns steps into programs, tensor by tensor."""

    def __init__(self, plan: Plan, checked: Checked, keys: Mapping[str, str], leaves: Mapping[str, Leaf]) -> None:
        self._plan = plan
        self._checked = checked
        self._keys = keys
        self._leaf_of = leaves
        self._ids: dict[str, int] = {}
        self._inner: dict[tuple[str, str, bool], int] = {}  # tensor key, tensor, whether as it is stored → inner program
        self.leaves: list[Leaf] = []
        self.inner: list[Program] = []

    def program(self, tensor: str, targets: Sequence[tuple[int, str, int]]) -> Program:
        """Compile one tensor for `targets`: output, whose tensor it is, and the position of its first byte there. All have one shape."""
        values: list[Value] = []
        made: dict[str, int] = {}  # tensor key → value
        emits = [Emit(output, self._value(name, tensor, values, made), start) for output, name, start in targets]
        shape = self._checked.tensors[targets[0][1]][tensor].shape
        return Program(tensor, shape, tuple(values), tuple(emits), last_used(values, emits), grain_of(values, math.prod(shape)))

    def _value(self, wanted: str, tensor: str, values: list[Value], made: dict[str, int]) -> int:
        """Append whatever it takes to make one tensor of a source or step, and return its position. Deep chains need no deep stack."""
        stack = [wanted]
        while stack:
            name = stack[-1]
            key = self._keys[name]
            if key in made:
                stack.pop()
            elif name in self._leaf_of:
                made[key] = self._stored(name, tensor, values)
                stack.pop()
            elif self._checked.operations[name][tensor].moved:
                made[key] = self._moved(name, tensor, values)
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

    def _stored(self, name: str, tensor: str, values: list[Value]) -> int:
        """Append the reading of a leaf's tensor, which the file may name otherwise."""
        if load := self._plain(name, tensor):
            return _append(values, load)
        return _append(values, self._move(name, self._checked.stored[name][tensor], is_stored=True))

    def _moved(self, name: str, tensor: str, values: list[Value]) -> int:
        """Append what it takes to make a tensor of an input's tensors of other names, or to count."""
        operation, step = self._checked.operations[name][tensor], self._plan.steps[name]
        made = operation.moved
        assert made, "BUG: the tensor is moved"
        if made.how == COUNTED or operation.copied is None:
            return _append(values, Count())
        source = step.inputs[operation.copied]
        is_run = len(made.names) == 1 and made.how not in {SWAPPED, TRANSPOSED}
        if is_run and (load := self._plain(source, made.names[0])):
            start, count = _run(made, load.numel)
            arg = _append(values, Load(load.leaf, load.start + start * ITEMSIZE[load.dtype], load.dtype, count))
        else:
            arg = _append(values, self._move(source, made, is_stored=False))
        return _append(values, Round(arg, operation.dtype, step.nonfinite == "saturate"))

    def _plain(self, name: str, tensor: str) -> Load | None:
        """Find where a tensor lies whole and unchanged in a leaf, however often it was renamed on the way; nothing when it does not."""
        while name not in self._leaf_of:
            operation = self._checked.operations[name][tensor]
            if operation.copied is None or operation.changes or (operation.moved and not operation.moved.is_renamed):
                return None
            name, tensor = self._plan.steps[name].inputs[operation.copied], operation.moved.names[0] if operation.moved else tensor
            if self._checked.tensors[name][tensor].dtype != operation.dtype:
                return None
        made = self._checked.stored.get(name, {}).get(tensor)
        if made and not made.is_renamed:
            return None
        return self._load(name, made.names[0] if made else tensor)

    def _move(self, name: str, made: Made, *, is_stored: bool) -> Move:
        """Compile the tensors that others are made of, each a program of its own."""
        held = self._leaf_of[name].header.tensors if is_stored else self._checked.tensors[name]
        runs = []
        for tensor in made.names:
            program, numel = self._part_of(name, tensor, is_stored=is_stored), held[tensor].numel
            start, count = _run(made, numel)
            runs += [(program, numel // 2, numel // 2), (program, 0, numel // 2)] if made.how == SWAPPED else [(program, start, count)]
        spec = held[made.names[0]]
        return Move(tuple(runs), spec.shape if made.how == TRANSPOSED else (), spec.dtype)

    def _part_of(self, name: str, tensor: str, *, is_stored: bool) -> int:
        """Return the inner program of a tensor, compiled when it is first asked for."""
        key = self._keys[name], tensor, is_stored
        if key not in self._inner:
            values: list[Value] = []
            value = _append(values, self._load(name, tensor)) if is_stored else self._value(name, tensor, values, {})
            shape = (self._leaf_of[name].header.tensors if is_stored else self._checked.tensors[name])[tensor].shape
            emits = [Emit(0, value, 0)]
            program = Program(tensor, shape, tuple(values), tuple(emits), last_used(values, emits), grain_of(values, math.prod(shape)))
            self._inner[key] = len(self.inner)
            self.inner.append(program)
        return self._inner[key]

    def _operation(self, name: str, tensor: str, operation: Operation, args: list[int | None], values: list[Value]) -> int:
        """Append what one step does to one tensor, and return the position of its result."""
        step = self._plan.steps[name]
        saturates = step.nonfinite == "saturate"
        if operation.changes:
            return self._bake(name, operation, args, values)
        if operation.copied is not None:
            arg = args[operation.copied]
            assert arg is not None, "BUG: a copied tensor is read"
            return _append(values, Round(arg, operation.dtype, saturates))
        shapes = [() if arg is None else self._checked.tensors[i][tensor].shape for i, arg in zip(step.inputs, args, strict=True)]
        rest: int | None = None
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

    def _bake(self, name: str, operation: Operation, args: list[int | None], values: list[Value]) -> int:
        """Append what a step's models come to, not rounded, and what its adapters do to it."""
        step = self._plan.steps[name]
        if operation.copied is None:
            wide = "F64" if step.compute == "fp64" else "F32"
            arg: int | None = _append(
                values,
                Apply(step.method, tuple(args), operation.params, step.compute, wide, operation.area, False, name),  # noqa: FBT003
            )
        else:
            arg = args[operation.copied]
        assert arg is not None, "BUG: what is changed is read"
        alterations = tuple(self._alteration(strength) for strength in operation.changes)
        cuts = {
            cut_of(a.change.kind, {role: shape for role, (_, shape) in a.factors.items()}, operation.shape, turned=a.change.turned)
            for a in alterations
        }
        cut = "nowhere" if "nowhere" in cuts else "filters"
        compute = "fp64" if step.compute == "fp64" else "fp32"  # no hardware multiplies sixteen bits alike
        return _append(values, Bake(arg, alterations, compute, operation.dtype, operation.shape, step.nonfinite == "saturate", cut))

    def _alteration(self, strength: Strength) -> Alteration:
        change, tensors = strength.change, self._leaf_of[strength.adapter].header.tensors
        factors = {role: (self._load(strength.adapter, factor), tensors[factor].shape) for role, factor in change.factors.items()}
        for role in TAKEN & factors.keys() if change.taken else ():
            load, (rows, *rest) = factors[role]
            first, count = change.taken or (0, rows)
            width = load.numel // rows
            start = load.start + first * width * ITEMSIZE[load.dtype]
            factors[role] = replace(load, start=start, numel=count * width), (count, *rest)
        return Alteration(strength.adapter, change, factors, strength.strength)


def _run(made: Made, numel: int) -> tuple[int, int]:
    """Find which elements of a tensor another is a part of: the first, and how many."""
    first, count, total = made.part
    return first * (numel // total), count * (numel // total)


def _append(values: list[Value], value: Value) -> int:
    values.append(value)
    return len(values) - 1
