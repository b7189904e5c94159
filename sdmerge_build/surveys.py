"""Owns surveys: what a method must know of whole models is found before the pass, tensor by tensor, and kept under a key.

Has never heard of outputs or of what any method asks for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import torch
from torch import Tensor

from sdmerge_build.check import Checked
from sdmerge_build.compiling import Compiler
from sdmerge_build.errors import Issue, SdbuildError
from sdmerge_build.evaluate import Evaluator
from sdmerge_build.methods import Findings, Method
from sdmerge_build.plan import Plan, Step
from sdmerge_build.programs import Apply, Leaf, Program, grain_of

__all__ = ["Models", "conduct"]

T = TypeVar("T")
_FLOATS = {"fp32": "F32", "fp64": "F64"}


def conduct(
    plan: Plan, checked: Checked, keys: Mapping[str, str], leaves: Mapping[str, Leaf], step: Step, findings: Mapping[str, Findings], jobs: int
) -> Findings:
    """Conduct the survey of a step. `findings` are those of the steps below it."""
    survey = step.method.survey
    assert survey, "BUG: only a method with a survey is surveyed"
    torch.set_num_threads(1)
    with Models(plan, checked, keys, leaves, step, findings, jobs) as models, torch.inference_mode():
        try:
            found = survey.function(models, **{name: step.params[name] for name in survey.parameters})
            return dict(json.loads(json.dumps(dict(found))))  # as it will be read back
        except (Exception, SystemExit) as error:
            if not step.method.origin or isinstance(error, SdbuildError):
                raise
            what = f"the survey of method `{step.method.name}` fails: {type(error).__name__}: {str(error)[:300]}"
            raise SdbuildError(Issue(what=what, hint="a survey returns a mapping of texts to numbers, texts and lists of them")) from error


class Models:
    """The models of a step, as its survey sees them: every tensor that the step computes of all of them, in float32 unless it says `fp64`."""

    def __init__(
        self,
        plan: Plan,
        checked: Checked,
        keys: Mapping[str, str],
        leaves: Mapping[str, Leaf],
        step: Step,
        findings: Mapping[str, Findings],
        jobs: int,
    ) -> None:
        operations = checked.operations[step.name]
        self.names = tuple(
            name
            for name, operation in sorted(operations.items())
            if operation.copied is None and operation.area == operation.shape and 0 not in operation.shape
        )
        self.architecture = plan.architecture.name
        self.component_of = plan.architecture.component_of
        self.count = len(step.inputs)
        self._compiler = Compiler(plan, checked, keys, leaves)
        self._step = step
        self._findings = findings
        self._jobs = jobs
        self._local = threading.local()
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._programs: dict[str, Program] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def tensor(self, model: int, name: str) -> Tensor:
        """Return one model's tensor, in its own shape."""
        program = self._program(name)
        emit = program.emits[model]
        evaluator = Evaluator([program], self._compiler.inner, self.architecture, self._findings)
        value = evaluator.evaluate(0, 0, program.numel, self._files(), {emit.value}, {})[emit.value]
        return value.to(torch.float64 if self._step.compute == "fp64" else torch.float32).view(program.shape)

    def ask(self, name: str, question: Callable[..., Any], cut: str = "anywhere") -> Any:
        """Run a function that yields measures, as methods do, over one tensor of all models, and return its conclusion."""
        program = self._program(name)
        method = Method(name="question", version=1, function=question, models=(), parameters={}, title="", cut=cut)
        args = tuple(emit.value for emit in program.emits)
        apply = Apply(method, args, {}, self._step.compute, _FLOATS.get(self._step.compute, "F32"), program.shape, False, self._step.name)  # noqa: FBT003
        row = replace(
            program, values=(*program.values, apply), last_used=(*program.last_used, ()), grain=grain_of([*program.values, apply], program.numel)
        )
        return Evaluator([row], self._compiler.inner, self.architecture, self._findings).conclusion(0, len(program.values), self._files())

    def map(self, function: Callable[[str], T], names: Iterable[str]) -> list[T]:
        """Apply a function to names in threads; results come in the order of names."""

        def quietly(name: str) -> T:
            with torch.inference_mode():
                return function(name)

        pool = ThreadPoolExecutor(self._jobs)
        try:
            return list(pool.map(quietly, names))
        finally:
            pool.shutdown(cancel_futures=True)

    def _program(self, name: str) -> Program:
        with self._lock:
            if name not in self._programs:
                self._programs[name] = self._compiler.program(name, [(n, model, 0) for n, model in enumerate(self._step.inputs)])
            return self._programs[name]

    def _files(self) -> Sequence[BinaryIO]:
        """Return this thread's own open files: positions belong to handles."""
        files: list[BinaryIO] = self._local.__dict__.setdefault("files", [])
        with self._lock:
            files += [self._stack.enter_context(leaf.path.open("rb", buffering=0)) for leaf in self._compiler.leaves[len(files) :]]
        return files
