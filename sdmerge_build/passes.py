"""Owns the pass: from wanted artifacts to one walk over all their tensors, in which each source tensor is read once.

Has never heard of torch or threads. A program says how one tensor of every artifact is made; a batch says which slices of which
tensors are worked on together, and which region of every artifact they fill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdmerge_build.check import Checked, Operation
from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.files import Snapshot
from sdmerge_build.plan import Plan
from sdmerge_build.tensorfile import Header, Layout, Spec

__all__ = ["Apply", "Batch", "Emit", "Leaf", "Load", "Output", "Pass", "Program", "Round", "Slice", "plan_passes"]

SLICE = 128 << 10
"""Elements evaluated at once. Measured: a third of this is slower for Python's overhead, eight times this for missing the cache."""

_USUALLY_ALIVE = 8
"""Values of a program that may be alive at once before slices shrink."""

BATCH = 1 << 20
"""Elements that are written and hashed at once, per artifact."""

MOST_OUTPUTS = 16
"""Artifacts of one pass: each needs memory for a few batches, a thread that hashes, and open files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A file that tensors are read from: a source, or an artifact already in the store."""

    name: str
    path: Path
    header: Header
    snapshot: Snapshot | None = None  # how a source was when its digests were learned; what the store holds does not change


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An artifact to be written."""

    name: str
    layout: Layout
    nonfinite: str  # `error` or `allow`


@dataclass(frozen=True, slots=True)
class Load:
    """Read a tensor of a leaf, as it is in the file; `start` is its first byte's position."""

    leaf: int
    start: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply a method to earlier values, and round once to `dtype`. A value the method takes nothing of is None."""

    function: Callable[..., Any]
    args: tuple[int | None, ...]
    params: Mapping[str, Any]
    compute: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Round:
    """Take an earlier value as another dtype, rounded once; exactly, when the dtype is its own."""

    arg: int
    dtype: str


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
    numel: int
    values: tuple[Load | Apply | Round, ...]
    emits: tuple[Emit, ...]
    last_used: tuple[tuple[int, ...], ...]
    """For each value, the earlier ones that nothing needs any more once it is made."""

    @property
    def slice_size(self) -> int:
        """Return how many elements to evaluate at once: fewer where many values are alive, so that memory does not grow with them."""
        alive = most = 0
        for dead in self.last_used:
            alive += 1
            most = max(most, alive)
            alive -= len(dead)
        return max(8, SLICE * _USUALLY_ALIVE // max(_USUALLY_ALIVE, most) // 8 * 8)


@dataclass(frozen=True, slots=True)
class Slice:
    """Some consecutive elements of a program's tensor."""

    program: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Slices worked on together, and for each output the (position, length) in bytes of the region of data they fill."""

    slices: tuple[Slice, ...]
    regions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One walk over tensors."""

    leaves: tuple[Leaf, ...]
    outputs: tuple[Output, ...]
    programs: tuple[Program, ...]
    batches: tuple[Batch, ...]

    @property
    def bytes_read(self) -> int:
        """Count the bytes that will be read."""
        return sum(p.numel * ITEMSIZE[v.dtype] for p in self.programs for v in p.values if isinstance(v, Load))

    @property
    def bytes_written(self) -> int:
        """Count the bytes that will be written."""
        return sum(output.layout.size for output in self.outputs)


def plan_passes(plan: Plan, checked: Checked, keys: Mapping[str, str], leaves: Mapping[str, Leaf], outputs: Sequence[Output]) -> Iterator[Pass]:
    """Yield as few passes as can write every output from front to back: one, but for strange layouts and very many outputs.

    `keys` are tensor keys by name; steps with equal keys are evaluated once. `leaves` are sources and stored artifacts by name.
    """
    for group in _groups(outputs):
        compiler = _Compiler(plan, checked, keys, leaves, group)
        names = sorted({spec.name for output in group for spec in output.layout.specs}, key=_work_order(group))
        programs = [compiler.program(name) for name in names]
        yield Pass(
            leaves=tuple(compiler.leaves),
            outputs=tuple(group),
            programs=tuple(programs),
            batches=tuple(_batches(programs, group)),
        )


def _ragged(output: Output) -> Iterator[Spec]:
    return (spec for spec in output.layout.specs if spec.numel % 8)


def _groups(outputs: Sequence[Output]) -> list[list[Output]]:
    """Put outputs together that one order of tensors suits.

    `file_order` makes orders agree but for ragged tensors of different dtypes. These are tiny in every known model, and fit
    into one batch, in which order does not matter; where they do not fit, outputs that disagree are written in separate passes.
    """
    groups: list[list[Output]] = []
    for output in outputs:
        fitting = (g for g in groups if len(g) < MOST_OUTPUTS and (_agree([*g, output]) or _fits_one_batch([*g, output])))
        group = next(fitting, None)
        if group is None:
            groups.append([output])
        else:
            group.append(output)
    return groups


def _agree(outputs: Iterable[Output]) -> bool:
    widths: dict[str, int] = {}
    return all(widths.setdefault(s.name, ITEMSIZE[s.dtype]) == ITEMSIZE[s.dtype] for output in outputs for s in _ragged(output))


def _fits_one_batch(outputs: Iterable[Output]) -> bool:
    return sum({s.name: s.numel for output in outputs for s in _ragged(output)}.values()) <= BATCH


def _work_order(group: Sequence[Output]) -> Callable[[str], tuple[bool, int, str]]:
    order = {s.name: (s.numel % 8 != 0, -ITEMSIZE[s.dtype] if s.numel % 8 else 0, s.name) for output in group for s in output.layout.specs}
    return order.__getitem__


class _Compiler:
    """Turns steps into programs, tensor by tensor."""

    def __init__(self, plan: Plan, checked: Checked, keys: Mapping[str, str], leaves: Mapping[str, Leaf], outputs: Sequence[Output]) -> None:
        self._plan = plan
        self._checked = checked
        self._keys = keys
        self._leaf_of = leaves
        self._ids: dict[str, int] = {}
        self._outputs = [(output.name, {spec.name: spec for spec in output.layout.specs}) for output in outputs]
        self.leaves: list[Leaf] = []

    def program(self, tensor: str) -> Program:
        """Compile one tensor of every output that has it."""
        values: list[Load | Apply | Round] = []
        made: dict[str, int] = {}  # tensor key → value
        emits = []
        numel = 0
        for n, (name, specs) in enumerate(self._outputs):
            if spec := specs.get(tensor):
                numel = spec.numel
                emits.append(Emit(n, self._value(name, tensor, values, made), spec.offset))
        return Program(tensor, numel, tuple(values), tuple(emits), _last_used(values, emits))

    def _value(self, wanted: str, tensor: str, values: list[Load | Apply | Round], made: dict[str, int]) -> int:
        """Append whatever it takes to make one tensor of a source or step, and return its position. Deep chains need no deep stack."""
        stack = [wanted]
        while stack:
            name = stack[-1]
            key = self._keys[name]
            if key in made:
                stack.pop()
            elif name in self._leaf_of:
                made[key] = self._append(values, self._load(name, tensor))
                stack.pop()
            else:
                operation, inputs = self._checked.operations[name][tensor], self._plan.steps[name].inputs
                lacking = [inputs[n] for n in operation.reads if self._keys[inputs[n]] not in made]
                if lacking:
                    stack += lacking
                    continue
                args = tuple(made[self._keys[i]] if n in operation.reads else None for n, i in enumerate(inputs))
                made[key] = self._append(values, self._operation(name, operation, args))
                stack.pop()
        return made[self._keys[wanted]]

    @staticmethod
    def _append(values: list[Load | Apply | Round], value: Load | Apply | Round) -> int:
        values.append(value)
        return len(values) - 1

    def _load(self, name: str, tensor: str) -> Load:
        leaf = self._leaf_of[name]
        if name not in self._ids:
            self._ids[name] = len(self.leaves)
            self.leaves.append(leaf)
        spec = leaf.header.tensors[tensor]
        return Load(self._ids[name], leaf.header.data_start + spec.offset, spec.dtype)

    def _operation(self, name: str, operation: Operation, args: tuple[int | None, ...]) -> Apply | Round:
        if operation.copied is not None:
            arg = args[operation.copied]
            assert arg is not None, "BUG: a copied tensor is read"
            return Round(arg, operation.dtype)
        step = self._plan.steps[name]
        return Apply(step.method.function, args, operation.params, step.compute, operation.dtype)


def _last_used(values: Sequence[Load | Apply | Round], emits: Sequence[Emit]) -> tuple[tuple[int, ...], ...]:
    """Find for each value which earlier ones it is the last to need; what is emitted is needed to the end."""
    needed = {emit.value for emit in emits}
    dead: list[tuple[int, ...]] = []
    for value in reversed(values):
        args = {value.arg} if isinstance(value, Round) else {a for a in value.args if a is not None} if isinstance(value, Apply) else set()
        dead.append(tuple(sorted(args - needed)))
        needed |= args
    return tuple(reversed(dead))


def _batches(programs: Sequence[Program], outputs: Sequence[Output]) -> Iterator[Batch]:
    """Cut the walk into batches, each of which fills one contiguous region of every output."""
    sizes = [{spec.name: ITEMSIZE[spec.dtype] for spec in output.layout.specs} for output in outputs]
    slices: list[Slice] = []
    elements = 0
    for n, program in enumerate(programs):
        start = 0
        if slices and program.numel % 8 and not programs[n - 1].numel % 8:  # ragged tensors may have to be in one batch
            yield Batch(tuple(slices), tuple(_regions(slices, programs, sizes)))
            slices, elements = [], 0
        size = program.slice_size
        while start < program.numel:
            count = min(size, program.numel - start, BATCH - elements)
            slices.append(Slice(n, start, count))
            start += count
            elements += count
            if elements == BATCH:
                yield Batch(tuple(slices), tuple(_regions(slices, programs, sizes)))
                slices, elements = [], 0
    if slices:
        yield Batch(tuple(slices), tuple(_regions(slices, programs, sizes)))


def _regions(slices: Sequence[Slice], programs: Sequence[Program], sizes: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, int]]:
    """Find the region each output's slices fill; (0, 0) where there are none."""
    bounds: dict[int, tuple[int, int]] = {}
    for piece in slices:
        program = programs[piece.program]
        for emit in program.emits:
            width = sizes[emit.output][program.tensor]
            begin = emit.start + piece.start * width
            low, high = bounds.get(emit.output, (begin, begin))
            bounds[emit.output] = min(low, begin), max(high, begin + piece.count * width)
    for n in range(len(sizes)):
        low, high = bounds.get(n, (0, 0))
        yield low, high - low
