"""Owns steps: a table's fields sorted into models and parameters by its method's signature, and what is left over complained of.

Has never heard of graphs, or of any recipe but the one it reads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdmerge_build.architectures import ARCHITECTURES, Architecture, architecture_named
from sdmerge_build.dtypes import Dtypes, read_dtypes
from sdmerge_build.errors import IntegrityError, Issue, nearest
from sdmerge_build.formula import FormulaError, evaluate, names_in, parse_formula, show
from sdmerge_build.methods import RANGES, REQUIRED, Method, Parameter, methods
from sdmerge_build.methods.documentation import found_for
from sdmerge_build.methods.moves import bad_pattern
from sdmerge_build.methods.own import OwnError, installed_methods, methods_in, pin_of
from sdmerge_build.recipe import Recipe, StepTable
from sdmerge_build.weights.ratio import MAX_ENTRIES, RatioError, read_ratio

__all__ = ["Call", "Step", "StepReader", "complete_steps", "own_methods"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One application of a method, everything resolved that the recipe alone can resolve."""

    name: str
    method: Method
    inputs: tuple[str, ...]  # names of sources or steps, in the method's order
    roles: tuple[str, ...]  # what the method calls them
    params: Mapping[str, Any]  # `Ratio`, tuple of `Ratio`, tuple of str, bool; for formulas their canonical text
    is_artifact: bool
    dtype: Dtypes
    compute: str  # `fp32`, `fp64` or `native`
    missing: str
    extra: str
    mismatch: str
    nonfinite: str
    title: str
    about: Mapping[str, str]  # author, description and license, where said

    @property
    def adapters(self) -> tuple[str, ...]:
        """List the inputs that must be adapters; others may be, where a sum of them means something."""
        rest = self.inputs[len(self.method.models) :] if self.method.rest == "adapters" else ()
        return (*(i for i, role in zip(self.inputs, self.roles, strict=True) if role == "adapter"), *rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A method and what a step gives it; inputs have the names that their own recipe gives them."""

    method: Method
    inputs: tuple[str, ...]
    roles: tuple[str, ...]
    params: Mapping[str, Any]
    parts: Mapping[str, str]  # components that are replaced afterwards, and by whose


def complete_steps(recipe: Recipe, name: str, call: Call | None, *, full_name: str, inputs: tuple[str, ...], is_artifact: bool) -> tuple[Step, ...]:
    """Complete a call with the step's fields and its recipe's defaults; `full_name` and `inputs` are names in the plan.

    Where components are replaced afterwards, that is a step of its own, after one that nobody named. That one has the same dtype: what is
    computed is rounded once.
    """
    step = _complete_step(recipe, name, call, full_name=full_name, inputs=inputs, is_artifact=is_artifact)
    if call is None or not call.parts:
        return (step,)
    count = len(inputs) - len(call.parts)
    made = replace(step, name=f"{full_name} (merged)", inputs=inputs[:count], is_artifact=False, about={})
    return made, replace(step, method=methods()["parts"], inputs=(made.name, *inputs[count:]), roles=("base", *call.parts), params={})


def _complete_step(recipe: Recipe, name: str, call: Call | None, *, full_name: str, inputs: tuple[str, ...], is_artifact: bool) -> Step:
    assert call is not None, "BUG: a step without meaning was planned"
    said, defaults = recipe.table.step[name], recipe.table.defaults

    def field(key: str, otherwise: Any) -> Any:
        return getattr(said, key) or getattr(defaults, key) or otherwise

    usual = "fp16" if is_artifact else "fp32"
    return Step(
        name=full_name,
        method=call.method,
        inputs=inputs,
        roles=call.roles,
        params=call.params,
        is_artifact=is_artifact,
        dtype=read_dtypes(field("dtype", usual) if is_artifact else said.dtype or usual, usual),
        compute=field("compute", "fp32"),
        missing=field("missing", "error"),
        extra=field("extra", "error"),
        mismatch=field("mismatch", "error"),
        nonfinite=field("nonfinite", "error"),
        title=said.title or name,
        about={key: text for key in ("author", "description", "license") if (text := field(key, ""))},
    )


def own_methods(recipe: Recipe, issues: list[Issue], *, locked: bool) -> dict[str, Method] | None:
    """Run the files of methods that a recipe names; with `locked`, only those that are pinned. None when one cannot be had.

    Raises `IntegrityError` for a file that is not the one that was pinned.
    """
    found: dict[str, Method] = {}
    count = len(issues)
    for n, file in enumerate(recipe.table.methods):
        where, path = recipe.where("methods", n), recipe.path.parent / file.path
        if locked and not file.sha256:
            what = f"the methods of `{file.path}` are not pinned, and --locked asks for it"
            issues.append(Issue(where=where, what=what, hint=f'read it, and write `{{ path = "{file.path}", sha256 = "{pin_of(path)}" }}`'))
            continue
        try:
            made = methods_in(path, file.sha256)
        except OwnError as error:
            issue = Issue(where=where, what=f"`{file.path}` {error}", hint=error.hint)
            if error.is_altered:
                raise IntegrityError(issue) from None
            issues.append(issue)
            continue
        if twice := [name for name in made if name in found]:
            issues.append(Issue(where=where, what=f"`{file.path}` defines `{twice[0]}`, as a file before it does"))
        found |= made
    return found if len(issues) == count else None


_FOREIGN = {
    "base_model": ("base",),
    "lambda": ("scale",),
    "lambda_": ("scale",),
    "t": ("alpha",),
    "weight": ("weights", "alpha"),
    "beta": ("offset",),
}
"""What fields are called in other tools, and here."""


class StepReader:
    """Sorts a step's fields into models and parameters by its method's signature, and complains of the rest."""

    def __init__(self, recipe: Recipe, architecture: Architecture, own: Mapping[str, Method] | None, issues: list[Issue]) -> None:
        self._recipe = recipe
        self._is_broken = own is None  # a file of methods could not be read, so any method may be one of its
        self._own = own or {}
        self._architecture = architecture
        self._issues = issues
        self._names = frozenset({*recipe.table.source, *recipe.table.step})
        self._check_dtype(recipe.table.defaults.dtype, "defaults", "dtype")

    def call(self, name: str, step: StepTable) -> Call | None:
        """Read what a step applies to what; None when an issue was found that leaves it without meaning."""
        self._check_dtype(step.dtype, "step", name, "dtype")
        if (step.formula is None) == (step.method is None):
            what = f"step `{name}` {'has both `formula` and' if step.formula else 'needs either `formula` or'} `method`"
            if "merge_method" in (step.model_extra or {}):
                return self._complain(name, "merge_method", what=what, hint="`merge_method` is `method` here")
            inner = next(
                (key for key, value in (step.model_extra or {}).items() if isinstance(value, dict) and not step.model_fields_set - {key}), ""
            )
            return self._complain(name, what=what, hint=f'a name with a dot needs quotes: [step."{name}.{inner}"]' if inner else "")
        return self._formula(name, step) if step.formula else self._method(name, step)

    def _complain(self, name: str, *fields: str, what: str, hint: str = "") -> None:
        self._issues.append(Issue(where=self._recipe.where("step", name, *fields), what=what, hint=hint))

    def _check_dtype(self, said: Any, *address: str) -> None:
        """Complain of a table of dtypes that names what the architecture does not have."""
        known = ["default", *self._architecture.components, "other"]
        for component in said if isinstance(said, Mapping) else ():
            if component not in known:
                what = f"`dtype` names `{component}`, which {self._architecture.title} does not have"
                hint = nearest(component, known) or f"components are {', '.join(known[1:])}; `default` is for the rest"
                self._issues.append(Issue(where=self._recipe.where(*address), what=what, hint=hint))

    def _formula(self, name: str, step: StepTable) -> Call | None:
        given = dict(step.model_extra or {})
        parts = self._parts(name, given)
        for field in given:
            hint = self._components_hint(field) or nearest(field, [*StepTable.model_fields, *self._architecture.components])
            self._complain(name, field, what=f"step `{name}` has an unknown field `{field}`", hint=hint)
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
        return Call(method=method, inputs=inputs, roles=roles, params={"formula": text}, parts=parts)

    def _method(self, name: str, step: StepTable) -> Call | None:
        known = {**methods(), **self._own}
        method = known.get(step.method or "") or self._installed(name, step.method or "")
        if method is None:
            what = f"step `{name}` asks for method `{step.method}`, which does not exist"
            return None if self._is_broken else self._complain(name, "method", what=what, hint=found_for(step.method or "", known))
        if method.needs and importlib.util.find_spec(method.needs) is None:
            what = f"`{method.name}`, the method of step `{name}`, needs a package that is not installed: {method.needs}"
            self._complain(name, "method", what=what, hint=f'pip install "sdbuild[{method.name}]"')
        given = dict(step.model_extra or {})
        inputs: list[str] = []
        for role in method.roles:
            if role not in given and method.gathers:  # what everything else is taken from may be left out
                continue
            if role not in given:
                self._complain(name, what=f"step `{name}` lacks `{role}`, {role if role == method.rest else 'a model'} that `{method.name}` needs")
            said = given.pop(role, None)
            inputs += self._inputs(name, role, said, several=role == method.rest) if said is not None else ()
        count = len(said) if method.is_open and isinstance(said, list) else None
        params = {p.name: self._param(name, p, given.pop(p.name, p.default), count) for p in method.parameters.values()}
        if method.is_open and method.models == ("base",) and inputs[:1] and inputs[0] in inputs[1:]:
            what = f"step `{name}` names `{inputs[0]}` as `base` and among `models`"
            self._complain(name, "models", what=what, hint="leave it out of `models`; mergekit does so by itself")
        parts = self._parts(name, given)
        if method.gathers and not parts:
            hint = self._components_hint("") or "an architecture without components has no parts"
            self._complain(name, what=f"step `{name}` names no component", hint=hint)
        for field in given:
            fields = [*method.roles, *method.parameters]
            foreign = next((ours for ours in _FOREIGN.get(field, ()) if ours in fields), "")
            hint = f"here it is `{foreign}`" if foreign else self._components_hint(field)
            hint = hint or nearest(field, [*fields, *StepTable.model_fields, *self._architecture.components])
            hint = hint or (f"its fields are {', '.join(fields)}" if fields else "models stand before a `/` in its function, fields behind a `*`")
            self._complain(name, field, what=f"step `{name}` has an unknown field `{field}`", hint=hint)
        if parts and method.name == "convert":
            self._complain_of_names(name, next(iter(parts)))
        if method.gathers:
            roles = (*method.models[: len(inputs)], *parts)
            return Call(method=method, inputs=(*inputs, *parts.values()), roles=roles, params=params, parts={})
        roles = (*method.models, *(str(n) for n in range(1, len(inputs) - len(method.models) + 1)))
        return Call(method=method, inputs=tuple(inputs), roles=roles, params=params, parts=parts)

    def _complain_of_names(self, name: str, component: str) -> None:
        what = f"step `{name}` replaces `{component}` of what `convert` makes, which has other names"
        self._complain(name, component, what=what, hint="replace it in a step before, and convert that step")

    def _parts(self, name: str, given: dict[str, Any]) -> dict[str, str]:
        """Take what names components out of a step's fields: whose each is to be, in the architecture's order."""
        named = {component: given.pop(component) for component in self._architecture.components if component in given}
        return {component: i for component, value in named.items() for i in self._inputs(name, component, value, several=False)}

    def _components_hint(self, field: str) -> str:
        """List the components for a field that is one elsewhere; all fields are, where no field is named."""
        components = self._architecture.components
        is_one = not field or any(field in architecture_named(name).components for name in ARCHITECTURES)
        return f"components of {self._architecture.title} are {', '.join(components)}" if components and is_one else ""

    def _installed(self, name: str, wanted: str) -> Method | None:
        """Look for a method among those of installed packages."""
        try:
            return installed_methods().get(wanted)
        except OwnError as error:
            return self._complain(name, "method", what=f"a package's methods {error}", hint=error.hint)

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
            if parameter.ratio:
                return self._ratios(parameter, value, models)
            match parameter.kind:
                case "Selection":
                    return self._selection(value)
                case "bool":
                    return _flag(value)
                case "int":
                    return _whole(value, -(2**63), 2**63 - 1)
                case "Seed":
                    return _whole(value, 0, 2**63 - 1)
                case "word":
                    return _word(value, parameter.words)
        except RatioError as error:
            return self._complain(name, parameter.name, what=f"{what} {error}", hint=error.hint)
        message = f"BUG: no reader for parameters of kind `{parameter.kind}`"
        raise AssertionError(message)

    def _ratios(self, parameter: Parameter, value: Any, models: int | None) -> Any:
        """Read a ratio, or one per model; a single one may stand for all."""
        low, high = RANGES[parameter.ratio or ""]
        if not parameter.is_list:
            return read_ratio(value, self._architecture, low, high)
        if not isinstance(value, list):
            return (read_ratio(value, self._architecture, low, high),) * (models or 1)
        if len(value) != (len(value) if models is None else models):
            message = f"must be a list of {models} ratios, one per model, or one ratio for all"
            raise RatioError(message)
        return tuple(read_ratio(item, self._architecture, low, high) for item in value)

    def _selection(self, value: Any) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise RatioError("must be a list of components or globs")
        if len(items) > MAX_ENTRIES:
            raise RatioError(f"has more than {MAX_ENTRIES} entries")
        components = self._architecture.components
        for item in items:
            if what := bad_pattern(item):
                raise RatioError(what)
            if components and item not in components and not set(item) & set("*?[./"):
                message = f"names `{item}`, which is neither a component of {self._architecture.title} nor a glob"
                raise RatioError(message, nearest(item, components) or f"components are {', '.join(components)}")
        return tuple(sorted(set(items)))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RatioError("must be `true` or `false`")
    return value


def _whole(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        message = f"must be a whole number{f' from {low}' if low > -(2**63) else ''}"
        raise RatioError(message)
    return value


def _word(value: Any, words: tuple[str, ...]) -> str:
    if value not in words:
        message = f"must be one of {', '.join(f'`{word}`' for word in words)}"
        raise RatioError(message, nearest(value, words) if isinstance(value, str) else "")
    return str(value)
