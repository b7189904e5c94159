"""Owns steps: a table's fields sorted into models and parameters by its method's signature, and what is left over complained of.

Has never heard of graphs, or of any recipe but the one it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdmerge_build.architectures import Architecture
from sdmerge_build.dtypes import RECIPE_NAMES
from sdmerge_build.errors import Issue, nearest
from sdmerge_build.formula import FormulaError, evaluate, names_in, parse_formula, show
from sdmerge_build.methods import REQUIRED, Method, Parameter, methods
from sdmerge_build.ratio import MAX_ENTRIES, RatioError, read_ratio
from sdmerge_build.recipe import Recipe, StepTable

__all__ = ["Call", "Step", "StepReader", "complete_step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One application of a method, everything resolved that the recipe alone can resolve."""

    name: str
    method: Method
    inputs: tuple[str, ...]  # names of sources or steps, in the method's order
    roles: tuple[str, ...]  # what the method calls them
    params: Mapping[str, Any]  # `Ratio`, tuple of `Ratio`, tuple of str, bool; for formulas their canonical text
    is_artifact: bool
    dtype: str  # a safetensors dtype, or `keep`
    compute: str  # `fp32`, `fp64` or `native`
    missing: str
    extra: str
    mismatch: str
    nonfinite: str
    title: str
    about: Mapping[str, str]  # author, description and license, where said


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A method and what a step gives it; inputs have the names that their own recipe gives them."""

    method: Method
    inputs: tuple[str, ...]
    roles: tuple[str, ...]
    params: Mapping[str, Any]


def complete_step(recipe: Recipe, name: str, call: Call | None, *, full_name: str, inputs: tuple[str, ...], is_artifact: bool) -> Step:
    """Complete a call with the step's fields and its recipe's defaults; `full_name` and `inputs` are names in the plan."""
    assert call is not None, "BUG: a step without meaning was planned"
    said, defaults = recipe.table.step[name], recipe.table.defaults

    def field(key: str, otherwise: str) -> str:
        return getattr(said, key) or getattr(defaults, key) or otherwise

    dtype = field("dtype", "fp16") if is_artifact else said.dtype or "fp32"
    return Step(
        name=full_name,
        method=call.method,
        inputs=inputs,
        roles=call.roles,
        params=call.params,
        is_artifact=is_artifact,
        dtype=RECIPE_NAMES[dtype],
        compute=field("compute", "fp32"),
        missing=field("missing", "error"),
        extra=field("extra", "error"),
        mismatch=field("mismatch", "error"),
        nonfinite=field("nonfinite", "error"),
        title=said.title or name,
        about={key: text for key in ("author", "description", "license") if (text := field(key, ""))},
    )


class StepReader:
    """Sorts a step's fields into models and parameters by its method's signature, and complains of the rest."""

    def __init__(self, recipe: Recipe, architecture: Architecture, issues: list[Issue]) -> None:
        self._recipe = recipe
        self._architecture = architecture
        self._issues = issues
        self._names = frozenset({*recipe.table.source, *recipe.table.step})

    def call(self, name: str, step: StepTable) -> Call | None:
        """Read what a step applies to what; None when an issue was found that leaves it without meaning."""
        if (step.formula is None) == (step.method is None):
            what = f"step `{name}` {'has both `formula` and' if step.formula else 'needs either `formula` or'} `method`"
            inner = next(
                (key for key, value in (step.model_extra or {}).items() if isinstance(value, dict) and not step.model_fields_set - {key}), ""
            )
            return self._complain(name, what=what, hint=f'a name with a dot needs quotes: [step."{name}.{inner}"]' if inner else "")
        return self._formula(name, step) if step.formula else self._method(name, step)

    def _complain(self, name: str, *fields: str, what: str, hint: str = "") -> None:
        self._issues.append(Issue(where=self._recipe.where("step", name, *fields), what=what, hint=hint))

    def _formula(self, name: str, step: StepTable) -> Call | None:
        for field in step.model_extra or {}:
            self._complain(name, field, what=f"step `{name}` has an unknown field `{field}`", hint=nearest(field, StepTable.model_fields))
        try:
            expression = parse_formula(step.formula or "", self._names)
        except FormulaError as error:
            return self._complain(name, "formula", what=f"the formula of step `{name}` {error}", hint=error.hint)
        inputs = tuple(names_in(expression))
        roles = tuple(str(n) for n in range(1, len(inputs) + 1))
        text = show(expression, {i: f"[{role}]" for i, role in zip(inputs, roles, strict=True)})

        def apply(*models: Any, formula: str) -> Any:  # noqa: ARG001  the text is there for keys
            return evaluate(expression, dict(zip(inputs, models, strict=True)))

        method = Method(name="formula", version=1, function=apply, models=(), parameters={}, title="Evaluate a formula.")
        return Call(method=method, inputs=inputs, roles=roles, params={"formula": text})

    def _method(self, name: str, step: StepTable) -> Call | None:
        method = methods().get(step.method or "")
        if method is None:
            what = f"step `{name}` asks for method `{step.method}`, which does not exist"
            return self._complain(name, "method", what=what, hint=nearest(step.method or "", methods()))
        given = dict(step.model_extra or {})
        models = method.models or ("models",)
        inputs: list[str] = []
        for role in models:
            if role not in given:
                self._complain(name, what=f"step `{name}` lacks `{role}`, a model that `{method.name}` needs")
            said = given.pop(role, None)
            inputs += self._inputs(name, role, said, several=not method.models) if said is not None else ()
        count = len(said) if not method.models and isinstance(said, list) else None
        params = {p.name: self._param(name, p, given.pop(p.name, p.default), count) for p in method.parameters.values()}
        for field in given:
            hint = nearest(field, [*models, *method.parameters, *StepTable.model_fields]) or f"`sdbuild methods {method.name}` lists its fields"
            self._complain(name, field, what=f"step `{name}` has an unknown field `{field}`", hint=hint)
        roles = method.models or tuple(str(n) for n in range(1, len(inputs) + 1))
        return Call(method=method, inputs=tuple(inputs), roles=roles, params=params)

    def _inputs(self, name: str, role: str, value: Any, *, several: bool) -> Iterable[str]:
        """Read one model, or the list `models`; names that mean nothing are complained of and left out."""
        listed = value if several else [value]
        if not isinstance(listed, list) or not listed or not all(isinstance(i, str) for i in listed):
            shape = "a list of names" if several else "a name"
            self._complain(name, role, what=f"`{role}` of step `{name}` must be {shape}")
            return
        for i in listed:
            if i in self._names:
                yield i
            else:
                what = f"step `{name}` names `{i}`, which is neither a source nor a step"
                self._complain(name, role, what=what, hint=nearest(i, self._names))

    def _param(self, name: str, parameter: Parameter, value: Any, models: int | None) -> Any:
        """Read one parameter by its kind; complaints leave None behind."""
        what = f"`{parameter.name}` of step `{name}`"
        if value is REQUIRED:
            return self._complain(name, what=f"step `{name}` lacks `{parameter.name}`")
        try:
            match parameter.kind:
                case "Ratio":
                    return read_ratio(value, self._architecture)
                case "list[Ratio]":
                    if not isinstance(value, list) or len(value) != (len(value) if models is None else models):
                        message = f"must be a list of {'' if models is None else f'{models} '}ratios, one per model"
                        raise RatioError(message)
                    return tuple(read_ratio(item, self._architecture) for item in value)
                case "Selection":
                    return self._selection(value)
        except RatioError as error:
            return self._complain(name, parameter.name, what=f"{what} {error}", hint=error.hint)
        message = f"BUG: no reader for parameters of kind `{parameter.kind}`"
        raise AssertionError(message)

    def _selection(self, value: Any) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise RatioError("must be a list of components or globs")
        if len(items) > MAX_ENTRIES:
            raise RatioError(f"has more than {MAX_ENTRIES} entries")
        components = self._architecture.components
        for item in items:
            if components and item not in components and not set(item) & set("*?[."):
                message = f"names `{item}`, which is neither a component of {self._architecture.title} nor a glob"
                raise RatioError(message, nearest(item, components) or f"components are {', '.join(components)}")
        return tuple(sorted(set(items)))
