"""Owns the pass: from wanted artifacts to one walk over all their tensors, in which each source tensor is read once.

Has never heard of torch or threads, nor of how a tensor is made. A batch says which slices of which tensors are worked on together, and
which region of every artifact they fill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdmerge_build.check import Checked
from sdmerge_build.compiling import Compiler
from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.plan import Plan
from sdmerge_build.programs import Leaf, Program, loads_of
from sdmerge_build.tensorfile import Layout, Spec

__all__ = ["Batch", "Output", "Pass", "Slice", "plan_passes"]

BATCH = 1 << 20
"""Elements that are written and hashed at once, per artifact."""

MOST_OUTPUTS = 16
"""Artifacts of one pass: each needs memory for a few batches, a thread that hashes, and open files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An artifact to be written."""

    name: str
    layout: Layout
    nonfinite: str  # `error` or `allow`


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

    architecture: str
    leaves: tuple[Leaf, ...]
    outputs: tuple[Output, ...]
    programs: tuple[Program, ...]
    inner: tuple[Program, ...]  # of tensors that those of others are parts of
    batches: tuple[Batch, ...]

    @property
    def everything(self) -> tuple[Program, ...]:
        """List every program, inner ones too."""
        return (*self.programs, *self.inner)

    @property
    def bytes_read(self) -> int:
        """Count the bytes that will be read."""
        loads = (load for program in self.everything for value in program.values for load in loads_of(value))
        return sum(load.numel * ITEMSIZE[load.dtype] for load in loads)

    @property
    def bytes_written(self) -> int:
        """Count the bytes that will be written."""
        return sum(output.layout.size for output in self.outputs)


def plan_passes(plan: Plan, checked: Checked, keys: Mapping[str, str], leaves: Mapping[str, Leaf], outputs: Sequence[Output]) -> Iterator[Pass]:
    """Yield as few passes as can write every output from front to back: one, but for strange layouts and very many outputs.

    `keys` are tensor keys by name; steps with equal keys are evaluated once. `leaves` are sources and stored artifacts by name.
    """
    for group in _groups(outputs):
        compiler = Compiler(plan, checked, keys, leaves)
        targets: dict[str, list[tuple[int, str, int]]] = {}
        for n, output in enumerate(group):
            for spec in output.layout.specs:
                targets.setdefault(spec.name, []).append((n, output.name, spec.offset))
        programs = [compiler.program(name, targets[name]) for name in sorted(targets, key=_work_order(group))]
        yield Pass(
            architecture=plan.architecture.name,
            leaves=tuple(compiler.leaves),
            outputs=tuple(group),
            programs=tuple(programs),
            inner=tuple(compiler.inner),
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
        fitting = (g for g in groups if len(g) < MOST_OUTPUTS and _have_one_shape([*g, output]) and _suit_one_order([*g, output]))
        group = next(fitting, None)
        if group is None:
            groups.append([output])
        else:
            group.append(output)
    return groups


def _have_one_shape(outputs: Sequence[Output]) -> bool:
    """Tell whether no tensor has several shapes: an inpainting model beside others has one that does."""
    shapes: dict[str, tuple[int, ...]] = {}
    return all(shapes.setdefault(s.name, s.shape) == s.shape for output in outputs for s in output.layout.specs)


def _suit_one_order(outputs: Sequence[Output]) -> bool:
    widths: dict[str, int] = {}
    if all(widths.setdefault(s.name, ITEMSIZE[s.dtype]) == ITEMSIZE[s.dtype] for output in outputs for s in _ragged(output)):
        return True
    return sum({s.name: s.numel for output in outputs for s in _ragged(output)}.values()) <= BATCH


def _work_order(group: Sequence[Output]) -> Callable[[str], tuple[bool, int, str]]:
    order = {s.name: (s.numel % 8 != 0, -ITEMSIZE[s.dtype] if s.numel % 8 else 0, s.name) for output in group for s in output.layout.specs}
    return order.__getitem__


def _batches(programs: Sequence[Program], outputs: Sequence[Output]) -> Iterator[Batch]:
    """Cut the walk into batches, each of which fills one contiguous region of every output."""
    sizes = [{spec.name: ITEMSIZE[spec.dtype] for spec in output.layout.specs} for output in outputs]
    slices: list[Slice] = []
    elements = 0
    for n, program in enumerate(programs):
        start, size = 0, program.slice_size
        if slices and program.numel % 8 and not programs[n - 1].numel % 8:  # ragged tensors may have to be in one batch
            yield Batch(tuple(slices), tuple(_regions(slices, programs, sizes)))
            slices, elements = [], 0
        while start < program.numel:
            count = min(size, program.numel - start)
            if elements + count > BATCH:
                count = min(count, (BATCH - elements) // program.grain * program.grain) or count
            if slices and elements + count > BATCH:
                yield Batch(tuple(slices), tuple(_regions(slices, programs, sizes)))
                slices, elements = [], 0
                continue
            slices.append(Slice(n, start, count))
            start += count
            elements += count
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
