"""Owns the plan: the recipe with its names resolved to methods, ratios and an order of steps.

Has never heard of files, headers or keys; it knows only what the recipe says. The one module that uses networkx.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from sdmerge_build.architectures import ARCHITECTURES, Architecture, architecture_named
from sdmerge_build.dtypes import RECIPE_NAMES
from sdmerge_build.errors import Issue, RecipeError, in_file_order, nearest
from sdmerge_build.formula import FormulaError, evaluate, names_in, parse_formula, show
from sdmerge_build.methods import REQUIRED, Method, Parameter, methods
from sdmerge_build.ratio import MAX_ENTRIES, RatioError, read_ratio
from sdmerge_build.recipe import FormError, Recipe, SourceTable, StepTable, read_recipe
from sdmerge_build.sources import UriError, page_of

__all__ = ["Plan", "Step", "plan_file", "plan_recipe"]


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
class Plan:
    """Steps in an order in which each comes after what it needs; only what the wanted artifacts need."""

    recipe: Recipe
    architecture: Architecture
    sources: Mapping[str, SourceTable]
    steps: Mapping[str, Step]
    wanted: tuple[str, ...]  # artifacts asked for, in recipe order

    def ancestors(self, name: str) -> list[str]:
        """List what a step stands on, and itself, parents first, in the order steps name them: the order of the file does not count."""
        found: dict[str, None] = {}
        stack = [name]
        while stack:
            here = stack[-1]
            inputs = self.steps[here].inputs if here in self.steps else ()
            if here in found or not (lacking := [i for i in inputs if i not in found]):
                found[stack.pop()] = None
            else:
                stack += reversed(lacking)
        return list(found)


def plan_file(path: Path, only: Collection[str] = ()) -> Plan:
    """Read and plan a recipe. Raises `RecipeError` with everything that is wrong with its form and its meaning, in file order."""
    try:
        recipe = read_recipe(path)
    except FormError as form:
        try:
            if form.sound:
                plan_recipe(form.sound, only)
        except RecipeError as meaning:
            raise RecipeError(*in_file_order([*form.issues, *meaning.issues])) from form
        raise
    return plan_recipe(recipe, only)


def plan_recipe(recipe: Recipe, only: Collection[str] = ()) -> Plan:
    """Resolve every name in a recipe. Raises `RecipeError` with everything that does not resolve.

    `only` asks for some artifacts instead of all.
    """
    issues: list[Issue] = []
    table = recipe.table
    if table.architecture not in ARCHITECTURES:
        hint = nearest(table.architecture, ARCHITECTURES) or f"known are {', '.join(f'`{a}`' for a in ARCHITECTURES)}"
        what = f"architecture `{table.architecture}` is not known"
        raise RecipeError(Issue(where=recipe.where("architecture"), what=what, hint=hint))
    reader = _StepReader(recipe, architecture_named(table.architecture), issues)
    calls = {name: reader.call(name, step) for name, step in table.step.items()}
    issues += _bad_sources(recipe)
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(calls)
    graph.add_edges_from((i, name) for name, call in calls.items() if call for i in call.inputs if i in calls)
    issues += _cycles(recipe, graph)
    defaults = table.defaults.artifact
    artifacts = dict.fromkeys(n for n in calls if _is_artifact(table.step[n].artifact, defaults, is_used=bool(graph.out_degree(n))))
    if not artifacts and not issues:
        issues.append(
            Issue(where=recipe.where("step"), what="no step is an artifact, so there is nothing to build", hint="write `artifact = true` in one")
        )
    issues += _bad_wishes(recipe, only, artifacts)
    if issues:
        raise RecipeError(*in_file_order(issues))
    wanted = tuple(n for n in artifacts if not only or n in only)
    needed = set(wanted).union(*nx.bfs_layers(graph.reverse(copy=False), wanted))
    position = {name: n for n, name in enumerate(calls)}
    order = [n for n in nx.lexicographical_topological_sort(graph, position.__getitem__) if n in needed]
    steps = {n: reader.finish(n, calls[n], is_artifact=n in artifacts) for n in order}
    used = {i for step in steps.values() for i in step.inputs}
    sources = {n: s for n, s in table.source.items() if n in used}
    return Plan(recipe=recipe, architecture=reader.architecture, sources=sources, steps=steps, wanted=wanted)


def _is_artifact(said: bool | None, default: bool | None, *, is_used: bool) -> bool:
    """Tell whether a step's result is kept: as it says, or as the defaults say, or when no other step uses it."""
    return said if said is not None else bool(default) or not is_used


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A method and what a step gives it."""

    method: Method
    inputs: tuple[str, ...]
    roles: tuple[str, ...]
    params: Mapping[str, Any]


class _StepReader:
    """Sorts a step's fields into models and parameters by its method's signature, and complains of the rest."""

    def __init__(self, recipe: Recipe, architecture: Architecture, issues: list[Issue]) -> None:
        self._recipe = recipe
        self.architecture = architecture
        self._issues = issues
        self._names = frozenset({*recipe.table.source, *recipe.table.step})

    def call(self, name: str, step: StepTable) -> _Call | None:
        """Read what a step applies to what; None when an issue was found that leaves it without meaning."""
        if (step.formula is None) == (step.method is None):
            what = f"step `{name}` {'has both `formula` and' if step.formula else 'needs either `formula` or'} `method`"
            inner = next(
                (key for key, value in (step.model_extra or {}).items() if isinstance(value, dict) and not step.model_fields_set - {key}), ""
            )
            return self._complain(name, what=what, hint=f'a name with a dot needs quotes: [step."{name}.{inner}"]' if inner else "")
        return self._formula(name, step) if step.formula else self._method(name, step)

    def finish(self, name: str, call: _Call | None, *, is_artifact: bool) -> Step:
        """Complete a step with its fields and the recipe's defaults."""
        assert call is not None, "BUG: a step without meaning was planned"
        said, defaults = self._recipe.table.step[name], self._recipe.table.defaults

        def field(key: str, otherwise: str) -> str:
            return getattr(said, key) or getattr(defaults, key) or otherwise

        dtype = field("dtype", "fp16") if is_artifact else said.dtype or "fp32"
        return Step(
            name=name,
            method=call.method,
            inputs=call.inputs,
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

    def _complain(self, name: str, *fields: str, what: str, hint: str = "") -> None:
        self._issues.append(Issue(where=self._recipe.where("step", name, *fields), what=what, hint=hint))

    def _formula(self, name: str, step: StepTable) -> _Call | None:
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
        return _Call(method=method, inputs=inputs, roles=roles, params={"formula": text})

    def _method(self, name: str, step: StepTable) -> _Call | None:
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
        return _Call(method=method, inputs=tuple(inputs), roles=roles, params=params)

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
                    return read_ratio(value, self.architecture)
                case "list[Ratio]":
                    if not isinstance(value, list) or len(value) != (len(value) if models is None else models):
                        message = f"must be a list of {'' if models is None else f'{models} '}ratios, one per model"
                        raise RatioError(message)
                    return tuple(read_ratio(item, self.architecture) for item in value)
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
        components = self.architecture.components
        for item in items:
            if components and item not in components and not set(item) & set("*?[."):
                message = f"names `{item}`, which is neither a component of {self.architecture.title} nor a glob"
                raise RatioError(message, nearest(item, components) or f"components are {', '.join(components)}")
        return tuple(sorted(set(items)))


def _bad_sources(recipe: Recipe) -> Iterator[Issue]:
    """Find sources that say nothing they could be found by, or an address nobody can read."""
    for name, source in recipe.table.source.items():
        if not (source.path or source.filename or source.sha256 or source.blake3 or source.uri):
            what = f"source `{name}` says nothing that it could be found by"
            yield Issue(where=recipe.where("source", name), what=what, hint="write its `path`, or its `filename`, `sha256` or `uri`")
        try:
            page_of(source.uri or "https://none")
        except UriError as error:
            hint = "write https://…, civitai:MODEL@VERSION, hf:OWNER/REPO/FILE@REVISION or recipe:OTHER.toml#STEP"
            yield Issue(where=recipe.where("source", name, "uri"), what=f"source `{name}`: {error}", hint=hint)


def _cycles(recipe: Recipe, graph: nx.DiGraph[str]) -> list[Issue]:
    """Show each knot of steps that depend on each other, once, as a path with its lines."""
    issues = []
    for knot in nx.strongly_connected_components(graph):
        inside = graph.subgraph(sorted(knot))
        if len(knot) == 1 and not inside.size():
            continue
        ring = [edge[0] for edge in nx.find_cycle(inside)]
        first = min(range(len(ring)), key=lambda n: ring[n])
        path = [*ring[first:], *ring[:first], ring[first]]
        shown = path if len(path) <= 12 else [*path[:6], "…", *path[-5:]]
        what = f"steps depend on each other: {' → '.join(f'`{n}`' for n in shown)}"
        lines = ", ".join(f"`{n}` at {recipe.where('step', n)}" for n in shown[:-1] if n != "…")
        issues.append(Issue(where=recipe.where("step", path[0]), what=what, hint=f"the steps are {lines}"))
    return sorted(issues, key=str)


def _bad_wishes(recipe: Recipe, only: Collection[str], artifacts: Collection[str]) -> list[Issue]:
    issues = []
    for name in only:
        if name in artifacts:
            continue
        if name in recipe.table.step:
            reason = "it says so" if recipe.table.step[name].artifact is False else "other steps use it"
            what, hint = f"step `{name}` is not an artifact: {reason}", "write `artifact = true` in it to keep its result as a file"
        else:
            what, hint = f"there is no step `{name}`", nearest(name, artifacts)
        issues.append(Issue(where=recipe.where("step", name), what=what, hint=hint))
    return issues
