"""Owns arithmetic: walks a pass, evaluates its programs on slices of tensors, and hands the bytes to the writer.

Has never heard of recipes, keys or the store. The one module, beside `methods`, that knows torch.
Operations are separate and correctly rounded, each on a slice of one tensor, so that results do not depend on threads or chunks.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.errors import Issue, SdbuildError
from sdmerge_build.evaluate import Evaluator
from sdmerge_build.methods import Findings
from sdmerge_build.passes import Batch, Pass, Slice
from sdmerge_build.programs import Load, Program, loads_of, moves_of
from sdmerge_build.questions import Stopped
from sdmerge_build.rounding import EIGHT_BITS, LARGEST, TORCH
from sdmerge_build.slices import read_slice
from sdmerge_build.writer import Buffers, Writer, Written

__all__ = ["run"]

_POLL_SECONDS = 0.1


def run(
    walk: Pass, targets: Sequence[Path], findings: Mapping[str, Findings], jobs: int, advanced: Callable[[int], None], *, keep_going: bool
) -> list[Written | SdbuildError]:
    """Walk a pass with `jobs` threads, writing its outputs to `targets`, which must not exist; return what was written, or why not.

    `findings` are those of the surveys that its steps ask for, by step.

    Raises the first error unless `keep_going`, and then only those that concern every output. The files are complete and on disk when it returns.
    """
    torch.set_num_threads(1)  # our threads share the work; torch's own would only get in their way
    _keep_freed_memory()
    sizes = [max((batch.regions[n][1] for batch in walk.batches), default=0) for n in range(len(walk.outputs))]
    files = [(target, output.layout) for target, output in zip(targets, walk.outputs, strict=True)]
    with Writer(files, sizes, spare=jobs + 2) as writer:
        walker = _Walker(walk, findings, writer, advanced, keep_going=keep_going)
        threads = [threading.Thread(target=walker.work, daemon=True) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(_POLL_SECONDS)  # in short waits, so that Ctrl-C is heard
        except BaseException:
            writer.stop()
            walker.stop()
            for thread in threads:
                thread.join()
            raise
        if writer.failure:
            raise writer.failure
        written = writer.finish()
    return [walker.failures.get(n, result) for n, result in enumerate(written)]


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the system.

    Measured: every slice frees a few arrays of half a megabyte; given back and asked for again, their pages cost a third of a pass.
    Other C libraries have no such call and need none.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)


class _Walker:
    """The work that every thread does until no batch is left."""

    def __init__(self, walk: Pass, findings: Mapping[str, Findings], writer: Writer, advanced: Callable[[int], None], *, keep_going: bool) -> None:
        self._walk = walk
        self._writer = writer
        self._advanced = advanced
        self._keep_going = keep_going
        self._queue = iter(enumerate(walk.batches))
        self._lock = threading.Lock()
        self._dtypes = [{spec.name: spec.dtype for spec in output.layout.specs} for output in walk.outputs]
        self._evaluator = Evaluator(walk.programs, walk.inner, walk.architecture, findings)
        self.failures: dict[int, SdbuildError] = {}

    def work(self) -> None:
        """Evaluate batches; what goes wrong stops every thread."""
        try:
            with contextlib.ExitStack() as stack, torch.inference_mode():
                files = [stack.enter_context(leaf.path.open("rb", buffering=0)) for leaf in self._walk.leaves]
                outputs = self._writer.handles(stack)
                while taken := self._take():
                    batch, buffers = taken
                    for piece in batch.slices:
                        self._evaluate(piece, files, buffers)
                    self._check(batch, buffers, files)
                    self._writer.write(outputs, buffers)
                    self._writer.done(buffers)
                    self._advanced(sum(length for _, length in batch.regions))
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised by `run`
            self._writer.stop(error)
            self.stop()

    def stop(self) -> None:
        """Wake those who wait for others' arithmetic."""
        self._evaluator.stopped.set()

    def _take(self) -> tuple[Batch, Buffers] | None:
        """Take the next batch and memory for it, under one lock: taken out of order, later batches could hold all memory and wait for ever."""
        with self._lock:
            index, batch = next(self._queue, (0, None))
            buffers = self._writer.buffers() if batch else None
            if batch is None or buffers is None:
                return None
            buffers.index, buffers.regions = index, batch.regions
            return batch, buffers

    def _evaluate(self, piece: Slice, files: Sequence[BinaryIO], buffers: Buffers) -> None:
        """Evaluate a program on one slice, and put what it emits into the batch's buffers."""
        program = self._walk.programs[piece.program]
        targets = [self._target(program, emit.output, emit.start, piece, buffers) for emit in program.emits]
        first_use = {emit.value: target for emit, target in zip(reversed(program.emits), reversed(targets), strict=True)}
        values = self._evaluator.evaluate(piece.program, piece.start, piece.count, files, first_use.keys(), first_use)
        for emit, target in zip(program.emits, targets, strict=True):
            if target is not values[emit.value]:
                target.copy_(values[emit.value])
        self._evaluator.release(piece.program, piece.count)

    def _check(self, batch: Batch, buffers: Buffers, files: Sequence[BinaryIO]) -> None:
        """Refuse values that are not finite: region by region, and tensor by tensor only where dtypes change or something is found."""
        for n, output in enumerate(self._walk.outputs):
            emitted = [(piece, emit) for piece in batch.slices for emit in self._walk.programs[piece.program].emits if emit.output == n]
            dtypes = {self._dtypes[n][self._walk.programs[piece.program].tensor] for piece, _ in emitted}
            if output.nonfinite == "allow" or n in self.failures or not dtypes:
                continue
            if len(dtypes) == 1 and _is_finite(_tensor(buffers.views[n][: batch.regions[n][1]], *dtypes)):
                continue
            for piece, emit in emitted:
                program = self._walk.programs[piece.program]
                if not _is_finite(self._target(program, n, emit.start, piece, buffers)):
                    self._refuse(n, program, emit.start, piece, buffers, files)

    def _target(self, program: Program, output: int, start: int, piece: Slice, buffers: Buffers) -> torch.Tensor:
        """Return the memory that a slice of an output goes to, as a tensor."""
        dtype = self._dtypes[output][program.tensor]
        begin = start + piece.start * ITEMSIZE[dtype] - buffers.regions[output][0]
        return _tensor(buffers.views[output][begin : begin + piece.count * ITEMSIZE[dtype]], dtype)

    def _refuse(self, output: int, program: Program, start: int, piece: Slice, buffers: Buffers, files: Sequence[BinaryIO]) -> None:
        """Say which tensor is not finite, and whose fault that is; told to keep going, give up this output alone."""
        if output in self.failures:
            return
        name = self._walk.outputs[output].name
        inner = [value for n in sorted(_needed(program, self._walk.inner)) for value in self._walk.inner[n].values]
        culprits = [
            self._walk.leaves[load.leaf].name
            for value in (*program.values, *inner)
            for load in loads_of(value)
            if not _is_finite(read_slice(files, load, *(_part_of(load, program, piece) if load is value else (0, load.numel))))
        ]
        dtype = self._dtypes[output][program.tensor]
        if culprits:
            what = f"artifact `{name}`: tensor `{program.tensor}` of `{culprits[0]}` holds values that are infinite or not numbers"
            hint = 'the file is damaged, or was merged beyond what its dtype holds; `nonfinite = "allow"` passes such values on'
        else:
            target = self._target(program, output, start, piece, buffers)
            is_undefined = dtype != "F8_E4M3" and bool(torch.isnan(target.to(torch.float32)).any())  # which has NaN for what is too large
            if is_undefined:
                what = f"artifact `{name}`: tensor `{program.tensor}` becomes what is not a number (NaN)"
                hint = 'the method divides by zero there, or takes the root or the power of a negative number; `nonfinite = "allow"` writes it'
            else:
                what = f"artifact `{name}`: tensor `{program.tensor}` becomes larger than {dtype} holds ({LARGEST.get(dtype, 0):g})"
                hint = 'use a wider `dtype`, or smaller ratios; `nonfinite = "saturate"` writes the largest number instead'
        error = SdbuildError(Issue(what=what, hint=hint))
        with self._lock:
            self.failures.setdefault(output, error)
        if not self._keep_going:
            raise error


def _tensor(data: memoryview, dtype: str) -> torch.Tensor:
    """See bytes as a flat tensor; dtypes that are only moved are seen as bytes."""
    return torch.frombuffer(data, dtype=TORCH.get(dtype, torch.uint8))


def _needed(program: Program, inner: Sequence[Program]) -> set[int]:
    """List the inner programs that one needs, and those that they need."""
    needed = moves_of(program)
    return needed.union(*(_needed(inner[n], inner) for n in needed))


def _part_of(value: Load, program: Program, piece: Slice) -> tuple[int, int]:
    """Find which elements of a stored tensor a slice reads: all, where its shape is another than the result's."""
    return (piece.start, piece.count) if value.numel == program.numel else (0, value.numel)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds numbers only; the extremes of a tensor with a NaN are NaN."""
    if not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.to(torch.float32) if tensor.dtype in EIGHT_BITS else tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())
