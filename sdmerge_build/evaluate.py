"""Owns evaluation: runs programs on slices of tensors, and finds out what methods ask of whole tensors.

Has never heard of outputs, recipes or keys. Operations are separate and correctly rounded, each on a slice of one tensor, so that results
do not depend on threads or chunks. What is asked of a whole tensor is measured chunk by chunk, by all threads that wait for the answer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdmerge_build.errors import Issue, SdbuildError
from sdmerge_build.methods import Findings, Place
from sdmerge_build.methods.changes import Baking, ChangeError, Loaded, prepare
from sdmerge_build.methods.measures import Measure, answer_alone, answered, chunk_size, seen
from sdmerge_build.programs import Apply, Bake, Count, Fit, Load, Move, Program, Round, args_of, moves_of
from sdmerge_build.questions import POLL_SECONDS, Question, Stopped
from sdmerge_build.rounding import EIGHT_BITS, narrowed, rounded, saturated
from sdmerge_build.slices import counted, fitted, moved, read_factor, read_slice, widened

__all__ = ["Evaluator"]

T = TypeVar("T")

_AHEAD = 16  # tensors that are looked through for the next in one piece


class _Site(NamedTuple):
    """One value of a program, on one slice, in one thread."""

    program: int
    value: int
    apply: Apply | Bake
    start: int
    length: int
    files: Sequence[BinaryIO]


class Evaluator:
    """Evaluates the programs of one walk, for all its threads. A thread that fails sets `stopped`, so that nobody waits for it.

    `inner` are programs of tensors that others are parts of; they are evaluated where these are.
    """

    def __init__(self, programs: Sequence[Program], inner: Sequence[Program], architecture: str, findings: Mapping[str, Findings]) -> None:
        self._outer = len(programs)
        self._programs = [*programs, *inner]
        self._architecture = architecture
        self._findings = findings  # by step
        self._lock = threading.Lock()
        self._questions: dict[int, dict[tuple[int, int], Question]] = {}  # by program, then value and phase
        self._whole: dict[int, dict[int, Future[Tensor]]] = {}  # by program, then value
        self._bakings: dict[int, dict[int, Future[Baking]]] = {}
        self._orders: dict[tuple[int, frozenset[int], bool], tuple[int, ...]] = {}
        self._left = [program.numel for program in programs]
        self._users = Counter(program for other in self._programs for program in moves_of(other))  # of inner programs
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
                case Count():
                    values[n] = counted(start, count)
                case Move() as move:
                    values[n] = moved(move, start, count, functools.partial(self._part, files))
                case Fit() as fit:
                    values[n] = fitted(fit, values)
                case Apply() | Bake() as apply:
                    size = math.prod(apply.shape)
                    site = _Site(index, n, apply, start, count if size == program.numel else size, files)
                    with _own_fault(apply, program.tensor):
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
        site = _Site(index, value, apply, 0, min(chunk_size(apply.cut, apply.shape), program.numel), files)
        return answered(self._started(site, self._args(site), {}), lambda phase, _: self._answers(site, phase))

    def release(self, index: int, count: int) -> None:
        """Forget what was learned of a tensor once all its elements were evaluated."""
        with self._lock:
            self._left[index] -= count
            if not self._left[index]:
                self._forget(index)

    def _forget(self, index: int) -> None:
        """Forget a program, and inner ones that no other needs."""
        for table in (self._questions, self._whole, self._bakings):
            table.pop(index, None)
        for program in moves_of(self._programs[index]):
            self._users[program] -= 1
            if not self._users[program]:
                self._forget(self._outer + program)

    def _part(self, files: Sequence[BinaryIO], inner: int, start: int, count: int) -> Tensor:
        """Evaluate some elements of an inner program, with those that may not be divided from them."""
        index = self._outer + inner
        program = self._programs[index]
        [emit] = program.emits
        low, high = start // program.grain * program.grain, min(program.numel, -(-(start + count) // program.grain) * program.grain)
        value = self.evaluate(index, low, high - low, files, {emit.value}, {})[emit.value]
        width = len(value) // (high - low)  # bytes of an element, where it is seen as bytes
        return value[(start - low) * width : (start - low + count) * width]

    def _order(self, index: int, wanted: frozenset[int], *, in_slices: bool) -> tuple[int, ...]:
        """List the values that some values need, and themselves, in order. Slices of what is not local need its result alone."""
        if (index, wanted, in_slices) not in self._orders:
            needed = set(wanted)
            for n, value in reversed(list(enumerate(self._programs[index].values))):
                if n in needed and not (in_slices and isinstance(value, (Apply, Bake)) and not value.is_local):
                    needed |= args_of(value)
            self._orders[index, wanted, in_slices] = tuple(sorted(needed))
        return self._orders[index, wanted, in_slices]

    def _applied(self, site: _Site, values: Mapping[int, Tensor], wide: dict[tuple[int, torch.dtype], Tensor], target: Tensor | None) -> Tensor:
        apply, numel = site.apply, math.prod(site.apply.shape)
        if not apply.is_local and (site.start, site.length) != (0, numel):
            return self._of_whole(site)[site.start : site.start + site.length] if apply.cut == "nowhere" else self._amid(site, numel)
        return self._made(site, values, wide, target)

    def _amid(self, site: _Site, numel: int) -> Tensor:
        """Apply a method to a slice and the neighbours that it must see, and return what it makes of the slice."""
        assert isinstance(site.apply, Apply), "BUG: only a method has a reach"
        reach = site.apply.method.reach * math.prod(site.apply.shape[1:])
        start, end = max(0, site.start - reach), min(numel, site.start + site.length + reach)
        around = site._replace(start=start, length=end - start)
        return self._made(around, self._args(around), {}, None)[site.start - start :][: site.length]

    def _made(self, site: _Site, values: Mapping[int, Tensor], wide: dict[tuple[int, torch.dtype], Tensor], target: Tensor | None) -> Tensor:
        """Apply a method or adapters to a slice; what is asked of the whole tensor is found out first."""
        apply, numel = site.apply, math.prod(site.apply.shape)
        made = self._baked(site, values, wide) if isinstance(apply, Bake) else self._started(site, values, wide)
        if inspect.isgenerator(made):
            alone = (site.start, site.length) == (0, numel) and (numel <= chunk_size(apply.cut, apply.shape) or apply.cut == "nowhere")
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
        apply = site.apply
        assert isinstance(apply, Apply), "BUG: only a method is called"
        method = apply.method
        models = [None if a is None else seen(widened(a, values, apply.compute, wide), method.cut, apply.shape) for a in apply.args]
        if method.origin:  # who knows what it does with them
            models = [model if model is None else model.clone() for model in models]
        params = dict(apply.params)
        if method.place:
            name = self._programs[site.program].tensor
            params[method.place] = Place(name=name, shape=apply.shape, start=site.start, count=site.length, architecture=self._architecture)
        if method.findings:
            params[method.findings] = self._findings[apply.step]
        return method.function(*models, **params)

    def _baked(self, site: _Site, values: Mapping[int, Tensor], wide: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
        """Apply adapters to a slice; what their factors come to for this tensor is prepared once, by whoever comes first."""
        bake = site.apply
        assert isinstance(bake, Bake), "BUG: only adapters are baked"

        def prepared() -> Baking:
            loaded = [
                Loaded(
                    kind=alteration.change.kind,
                    factors={role: read_factor(site.files, load, shape) for role, (load, shape) in alteration.factors.items()},
                    rows=alteration.change.rows,
                    turned=alteration.change.turned,
                    strength=alteration.strength,
                    scale=alteration.change.scale,
                )
                for alteration in bake.alterations
            ]
            return prepare(loaded, bake.shape, torch.float64 if bake.compute == "fp64" else torch.float32)

        baking = self._once(self._bakings, site, prepared)
        return baking.apply(widened(bake.arg, values, bake.compute, wide), site.start)

    def _answers(self, site: _Site, phase: int) -> tuple[Any, ...]:
        """Answer what a method asks of a whole tensor; whoever comes first or meanwhile helps to measure."""
        numel = math.prod(site.apply.shape)
        with self._lock:
            questions = self._questions.setdefault(site.program, {})
            if (site.value, phase) not in questions:
                size = chunk_size(site.apply.cut, site.apply.shape)
                questions[site.value, phase] = Question([(start, min(size, numel - start)) for start in range(0, numel, size)])
            question = questions[site.value, phase]
        while chunk := question.take(self.stopped):
            number, start, count = chunk
            question.measure(number, self._asked(site._replace(start=start, length=count), phase))
        assert question.answers is not None, "BUG: a question ends with its answers"
        return question.answers

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
        """Return the result of a method that needs the tensor in one piece."""

        def computed() -> Tensor:
            everything = site._replace(start=0, length=math.prod(site.apply.shape))
            values = dict(self._args(everything))
            for n in values:  # a large tensor is not kept in two dtypes
                values[n] = widened(n, values, site.apply.compute, {})
            return self._applied(everything, values, {}, None)

        return self._once(self._whole, site, computed, meanwhile=self._begin_next)

    def _once(
        self, table: dict[int, dict[int, Future[T]]], site: _Site, make: Callable[[], T], meanwhile: Callable[[_Site], None] | None = None
    ) -> T:
        """Return what is made once for a value of a program, by whoever comes first; others wait, and may do something `meanwhile`."""
        with self._lock:
            known = table.setdefault(site.program, {})
            is_first = site.value not in known
            future = known.setdefault(site.value, Future())
        if is_first:
            future.set_result(make())
        elif meanwhile and not future.done():
            meanwhile(site)
        while not wait([future], POLL_SECONDS).done:
            if self.stopped.is_set():
                raise Stopped
        return future.result()

    def _begin_next(self, site: _Site) -> None:
        """Compute the next tensor that is needed in one piece and that nobody has begun, instead of waiting for somebody else's."""
        for index in range(site.program + 1, min(site.program + _AHEAD, self._outer)):
            program = self._programs[index]
            if program.numel > program.slice_size and self._left[index] == program.numel:
                for n, value in enumerate(program.values):
                    if isinstance(value, (Apply, Bake)) and value.cut == "nowhere" and n not in self._whole.get(index, ()):
                        self._of_whole(_Site(index, n, value, 0, program.numel, site.files))
                        return


@contextlib.contextmanager
def _own_fault(apply: Apply | Bake, tensor: str) -> Iterator[None]:
    """Say of what goes wrong in a method that is not built in whose fault it is."""
    try:
        yield
    except ChangeError as error:
        assert isinstance(apply, Bake), "BUG: only adapters change"
        what = f"adapter `{apply.alterations[error.number].adapter}` cannot be applied to `{tensor}`: {error}"
        raise SdbuildError(Issue(what=what)) from error
    except (Exception, SystemExit) as error:
        if isinstance(apply, Bake) or not apply.method.origin or isinstance(error, (SdbuildError, Stopped)):
            raise
        method = apply.method
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name == method.function.__name__]
        what = f"method `{method.name}` fails on tensor `{tensor}`{f', in line {own[-1]}' if own else ''}: {type(error).__name__}: {str(error)[:300]}"
        raise SdbuildError(Issue(what=what, hint="models come as flat slices unless the method says `cut`; see README")) from error
