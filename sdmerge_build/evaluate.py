"""Owns evaluation: runs programs on slices of tensors, and finds out what methods ask of whole tensors.

Has never heard of outputs, recipes or keys. Operations are separate and correctly rounded, each on a slice of one tensor, so that results
do not depend on threads or chunks. What is asked of a whole tensor is measured chunk by chunk, by all threads that wait for the answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
import threading
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.errors import IntegrityError, Issue, SdbuildError
from sdmerge_build.methods import Findings, Method, Place
from sdmerge_build.methods.measures import Measure, answer_alone, answered, chunk_size, seen
from sdmerge_build.programs import Apply, Fit, Load, Program, Round, args_of
from sdmerge_build.rounding import EIGHT_BITS, TORCH, narrowed, rounded, saturated

__all__ = ["Evaluator", "Stopped", "read_slice"]

_POLL_SECONDS = 0.1
_AHEAD = 16  # tensors that are looked through for the next in one piece


class Stopped(Exception):  # noqa: N818  nothing is wrong with the one who stops
    """Somebody else failed, and nobody needs what was being computed."""


def read_slice(files: Sequence[BinaryIO], value: Load, start: int, count: int) -> Tensor:
    """Read elements of a stored tensor; dtypes that are only moved are seen as bytes."""
    file, width = files[value.leaf], ITEMSIZE[value.dtype]
    torch_dtype = TORCH.get(value.dtype, torch.uint8)
    tensor = torch.empty(count * width // torch_dtype.itemsize, dtype=torch_dtype)
    view = memoryview((ctypes.c_ubyte * (count * width)).from_address(tensor.data_ptr())).cast("B")
    file.seek(value.start + start * width)
    have = 0
    while have < len(view):
        got = file.readinto(view[have:])  # type: ignore[attr-defined]  # raw files have it
        if not got:
            raise IntegrityError(Issue(where=str(file.name), what="the file became shorter while it was being read"))
        have += got
    return tensor


class _Job:
    """One question to one whole tensor: its chunks, what was measured of them, and who waits."""

    def __init__(self, chunks: Sequence[tuple[int, int]]) -> None:
        self._chunks = chunks
        self.condition = threading.Condition()
        self.waiting = list(reversed(range(len(chunks))))
        self._left = len(chunks)
        self._states: list[Any] = []
        self._final: list[bool] = []
        self._partials: list[dict[int, Any]] = []
        self.answers: tuple[Any, ...] | None = None

    def take(self, stopped: threading.Event) -> tuple[int, int, int] | None:
        """Take a chunk to measure: number, start and length; wait while others measure the last ones. None when the answers are there."""
        with self.condition:
            while self.answers is None and not self.waiting:
                self.condition.wait(_POLL_SECONDS)
                if stopped.is_set():
                    raise Stopped
            if self.answers is not None:
                return None
            number = self.waiting.pop()
            return number, *self._chunks[number]

    def measure(self, number: int, measures: Sequence[Measure]) -> None:
        """Measure a chunk; whoever measures the last one joins them all."""
        with self.condition:
            if not self._partials:
                self._states, self._final = [None] * len(measures), [False] * len(measures)
                self._partials = [{} for _ in measures]
            states, final = self._states, self._final
        found = [None if is_final else m.partial(state) for m, state, is_final in zip(measures, states, final, strict=True)]
        with self.condition:
            for measure, partial, known, is_final in zip(measures, found, self._partials, final, strict=True):
                if not is_final:
                    key = number if measure.is_ordered else 0
                    known[key] = measure.added(known[key], partial) if key in known else partial
            self._left -= 1
            if not self._left:
                self._join(measures)
            self.condition.notify_all()

    def _join(self, measures: Sequence[Measure]) -> None:
        for n, measure in enumerate(measures):
            if not self._final[n]:
                known = self._partials[n]
                self._final[n], self._states[n] = measure.joined([known[key] for key in sorted(known)], self._states[n])
        if all(self._final):
            self.answers = tuple(self._states)
            return
        self._states, self._final = list(self._states), list(self._final)
        self._partials = [{} for _ in measures]
        self._left = len(self._chunks)
        self.waiting = list(reversed(range(len(self._chunks))))


class _Site(NamedTuple):
    """One value of a program, on one slice, in one thread."""

    program: int
    value: int
    apply: Apply
    start: int
    length: int
    files: Sequence[BinaryIO]


class Evaluator:
    """Evaluates the programs of one walk, for all its threads. A thread that fails sets `stopped`, so that nobody waits for it."""

    def __init__(self, programs: Sequence[Program], architecture: str, findings: Mapping[str, Findings]) -> None:
        self._programs = programs
        self._architecture = architecture
        self._findings = findings  # by step
        self._lock = threading.Lock()
        self._jobs: dict[int, dict[tuple[int, int], _Job]] = {}  # by program, then value and phase
        self._whole: dict[int, dict[int, Future[Tensor]]] = {}  # by program, then value
        self._orders: dict[tuple[int, frozenset[int], bool], tuple[int, ...]] = {}
        self._left = [program.numel for program in programs]
        self.stopped = threading.Event()

    def evaluate(
        self, index: int, start: int, count: int, files: Sequence[BinaryIO], wanted: Collection[int], targets: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """Evaluate `wanted` values of a program on a slice, flat; where there is a target, the result is rounded straight into it."""
        program = self._programs[index]
        values: dict[int, Tensor] = {}
        wide: dict[tuple[int, torch.dtype], Tensor] = {}
        for n in self._order(index, frozenset(wanted), in_slices=count < program.numel):
            match program.values[n]:
                case Load() as load:
                    values[n] = read_slice(files, load, start, count if load.numel == program.numel else load.numel)
                case Round() as copy:
                    values[n] = narrowed(values[copy.arg], copy.dtype, saturates=copy.saturates)
                case Fit() as fit:
                    values[n] = _fitted(fit, values)
                case Apply() as apply:
                    size = math.prod(apply.shape)
                    site = _Site(index, n, apply, start, count if size == program.numel else size, files)
                    with _own_fault(apply.method, program.tensor):
                        values[n] = self._applied(site, values, wide, targets.get(n))
            for dead in program.last_used[n]:
                values.pop(dead, None)
                wide = {key: tensor for key, tensor in wide.items() if key[0] != dead}
        return values

    def conclusion(self, index: int, value: int, files: Sequence[BinaryIO]) -> Any:
        """Run a measured function over a whole tensor, and return what it returns when all its questions are answered."""
        program = self._programs[index]
        apply = program.values[value]
        assert isinstance(apply, Apply), "BUG: only a function concludes"
        site = _Site(index, value, apply, 0, min(chunk_size(apply.method.cut, apply.shape), program.numel), files)
        return answered(self._started(site, self._args(site), {}), lambda phase, _: self._answers(site, phase))

    def release(self, index: int, count: int) -> None:
        """Forget what was learned of a tensor once all its elements were evaluated."""
        with self._lock:
            self._left[index] -= count
            if not self._left[index]:
                self._jobs.pop(index, None)
                self._whole.pop(index, None)

    def _order(self, index: int, wanted: frozenset[int], *, in_slices: bool) -> tuple[int, ...]:
        """List the values that some values need, and themselves, in order. Of what cannot be cut, slices need the result alone."""
        if (index, wanted, in_slices) not in self._orders:
            needed = set(wanted)
            for n, value in reversed(list(enumerate(self._programs[index].values))):
                if n in needed and not (in_slices and isinstance(value, Apply) and value.method.cut == "nowhere"):
                    needed |= args_of(value)
            self._orders[index, wanted, in_slices] = tuple(sorted(needed))
        return self._orders[index, wanted, in_slices]

    def _applied(self, site: _Site, values: Mapping[int, Tensor], wide: dict[tuple[int, torch.dtype], Tensor], target: Tensor | None) -> Tensor:
        apply, numel = site.apply, math.prod(site.apply.shape)
        if apply.method.cut == "nowhere" and (site.start, site.length) != (0, numel):
            return self._of_whole(site)[site.start : site.start + site.length]
        made = self._started(site, values, wide)
        if inspect.isgenerator(made):
            alone = (site.start, site.length) == (0, numel) and (numel <= chunk_size(apply.method.cut, apply.shape) or apply.method.cut == "nowhere")
            made = answered(made, answer_alone if alone else lambda phase, _: self._answers(site, phase))
        result = made.reshape(-1)
        if len(result) != site.length or not result.is_floating_point():  # torch would spread a single element over all
            message = f"it returned {len(result)} {result.dtype} for {site.length} elements; a method returns fractions, in the shape it was given"
            raise ValueError(message)
        if target is None:
            return narrowed(result, apply.dtype, saturates=apply.saturates)
        if apply.saturates:
            result = saturated(result, target.dtype)
        return target.copy_(rounded(result, target.dtype) if result.dtype is torch.float64 or target.dtype in EIGHT_BITS else result)

    def _started(self, site: _Site, values: Mapping[int, Tensor], wide: dict[tuple[int, torch.dtype], Tensor]) -> Any:
        """Call a method on a slice: its result, or a generator that has not begun."""
        apply, method = site.apply, site.apply.method
        models = [None if a is None else seen(_widened(a, values, apply.compute, wide), method.cut, apply.shape) for a in apply.args]
        if method.origin:  # who knows what it does with them
            models = [model if model is None else model.clone() for model in models]
        params = dict(apply.params)
        if method.place:
            name = self._programs[site.program].tensor
            params[method.place] = Place(name=name, shape=apply.shape, start=site.start, count=site.length, architecture=self._architecture)
        if method.findings:
            params[method.findings] = self._findings[apply.step]
        return method.function(*models, **params)

    def _answers(self, site: _Site, phase: int) -> tuple[Any, ...]:
        """Answer what a method asks of a whole tensor; whoever comes first or meanwhile helps to measure."""
        numel = math.prod(site.apply.shape)
        with self._lock:
            jobs = self._jobs.setdefault(site.program, {})
            if (site.value, phase) not in jobs:
                size = chunk_size(site.apply.method.cut, site.apply.shape)
                jobs[site.value, phase] = _Job([(start, min(size, numel - start)) for start in range(0, numel, size)])
            job = jobs[site.value, phase]
        while chunk := job.take(self.stopped):
            number, start, count = chunk
            job.measure(number, self._asked(site._replace(start=start, length=count), phase))
        assert job.answers is not None, "BUG: a job ends with its answers"
        return job.answers

    def _asked(self, site: _Site, phase: int) -> Sequence[Measure]:
        """Run a method on a chunk until it asks for the measures of a phase."""
        made = self._started(site, self._args(site), {})
        try:
            asked = next(made)
            for earlier in range(phase):
                answers = self._answers(site, earlier)
                asked = made.send(answers if isinstance(asked, tuple) else answers[0])
        except StopIteration:
            raise ValueError("it asks about the tensor on some slices, and returns without asking on others") from None
        return asked if isinstance(asked, tuple) else (asked,)

    def _args(self, site: _Site) -> Mapping[int, Tensor]:
        """Evaluate what a method is given on a slice that others may not divide there."""
        program, numel = self._programs[site.program], math.prod(site.apply.shape)
        low, high, grain = 0, program.numel, program.grain
        if numel == program.numel:
            low, high = site.start // grain * grain, min(numel, -(-(site.start + site.length) // grain) * grain)
        values = self.evaluate(site.program, low, high - low, site.files, args_of(site.apply), {})
        return {n: value[site.start - low :][: site.length] for n, value in values.items()}

    def _of_whole(self, site: _Site) -> Tensor:
        """Return the result of a method that needs the tensor in one piece: computed once, by whoever comes first."""
        with self._lock:
            known = self._whole.setdefault(site.program, {})
            is_first = site.value not in known
            whole = known.setdefault(site.value, Future())
        if is_first:
            numel = math.prod(site.apply.shape)
            everything = site._replace(start=0, length=numel)
            whole.set_result(self._applied(everything, self._args(everything), {}, None))
        elif not whole.done():
            self._begin_next(site)
        while not wait([whole], _POLL_SECONDS).done:
            if self.stopped.is_set():
                raise Stopped
        return whole.result()

    def _begin_next(self, site: _Site) -> None:
        """Compute the next tensor that is needed in one piece and that nobody has begun, instead of waiting for somebody else's."""
        for index in range(site.program + 1, min(site.program + _AHEAD, len(self._programs))):
            program = self._programs[index]
            if program.numel > program.slice_size and self._left[index] == program.numel:
                for n, value in enumerate(program.values):
                    if isinstance(value, Apply) and value.method.cut == "nowhere" and n not in self._whole.get(index, ()):
                        self._of_whole(_Site(index, n, value, 0, program.numel, site.files))
                        return


@contextlib.contextmanager
def _own_fault(method: Method, tensor: str) -> Iterator[None]:
    """Say of what goes wrong in a method that is not built in whose fault it is."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not method.origin or isinstance(error, (SdbuildError, Stopped)):
            raise
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name == method.function.__name__]
        what = f"method `{method.name}` fails on tensor `{tensor}`{f', in line {own[-1]}' if own else ''}: {type(error).__name__}: {str(error)[:300]}"
        raise SdbuildError(Issue(what=what, hint="models come as flat slices unless the method says `cut`; see README")) from error


def _widened(arg: int, values: Mapping[int, Tensor], compute: str, wide: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
    """Give a value the dtype that arithmetic is done in; converted once for all who use it."""
    value = values[arg]
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(compute, value.dtype)
    if dtype in EIGHT_BITS:
        dtype = torch.float32  # no arithmetic is defined on eight bits
    if dtype is value.dtype:
        return value
    if (arg, dtype) not in wide:
        wide[arg, dtype] = value.to(dtype)
    return wide[arg, dtype]


def _fitted(fit: Fit, values: Mapping[int, Tensor]) -> Tensor:
    """Take of a value what two shapes have in common, and the rest from another, or zeros."""
    value = values[fit.arg].view(fit.shape)
    common = tuple(slice(0, min(sizes)) for sizes in zip(fit.shape, fit.to, strict=True))
    made = value.new_zeros(fit.to) if fit.under is None else values[fit.under].view(fit.to).clone()
    made[common] = value[common]
    return made.reshape(-1)
