"""Owns the plan: recipes with their names resolved to methods, ratios and one order of steps.

Has never heard of headers, tensors or keys; of files it knows only that recipes name other recipes. The one module that uses networkx.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx

from sdmerge_build.architectures import ARCHITECTURES, Architecture, architecture_named, architecture_names, is_architecture
from sdmerge_build.errors import Issue, RecipeError, in_file_order, nearest, printable
from sdmerge_build.recipe import FormError, Recipe, SourceTable, read_recipe
from sdmerge_build.sources import UriError, page_of
from sdmerge_build.sources.uri import RecipeAddress, parse_uri
from sdmerge_build.steps import Call, Step, StepReader, complete_steps, own_methods

__all__ = ["Origin", "Plan", "Step", "plan_file", "plan_recipe"]

MAX_RECIPES = 100
_SECRET = re.compile(r"://[^/]*@|[?&#](?:token|key|apikey|api_key|sig|signature)=", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a source or step of a plan was said: the recipe, and the name it has there."""

    recipe: Recipe
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Steps in an order in which each comes after what it needs; only what the wanted artifacts need.

    Names of the root recipe are as they are; those of others are `REL#NAME`, with the file's place seen from the root recipe's folder.
    """

    recipe: Recipe  # the root
    others: Mapping[str, Recipe]  # REL → recipe, every file that was read beside the root
    architecture: Architecture
    sources: Mapping[str, SourceTable]
    steps: Mapping[str, Step]
    wanted: tuple[str, ...]  # artifacts asked for, in recipe order
    origins: Mapping[str, Origin]  # of every source and step

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """List every recipe that was read, the root first."""
        return (self.recipe, *self.others.values())

    def tables(self) -> list[tuple[str, Recipe]]:
        """List every recipe with what stands in front of its names."""
        return [("", self.recipe), *((f"{name}#", recipe) for name, recipe in self.others.items())]

    def where(self, kind: str, name: str, *fields: str | int) -> str:
        """Name the file and line of a `source` or `step`, in the recipe that says it."""
        origin = self.origins[name]
        return origin.recipe.where(kind, origin.name, *fields)

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


def plan_file(path: Path, only: Collection[str] = (), *, locked: bool = False) -> Plan:
    """Read and plan a recipe and those it names; with `locked`, no file of methods is run that is not pinned.

    Raises `RecipeError` with everything that is wrong with their form and their meaning, file by file, the root first.
    """
    issues: list[Issue] = []
    return _planned(_read(path, issues), only, issues, locked=locked)


def plan_recipe(recipe: Recipe, only: Collection[str] = ()) -> Plan:
    """Resolve every name in a recipe and in those it names. Raises `RecipeError` with everything that does not resolve.

    `only` asks for some artifacts instead of all.
    """
    return _planned(recipe, only, [], locked=False)


def _planned(root: Recipe | None, only: Collection[str], issues: list[Issue], *, locked: bool) -> Plan:
    if root is None:
        raise RecipeError(*issues)
    shelf = _Shelf(root, issues, locked=locked)
    steps = {file.prefix + name: (file, name) for file in shelf.files for name in file.read_steps()}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(steps)
    graph.add_edges_from((i, full) for full, (file, name) in steps.items() for i in file.inputs(name) if i in steps)
    _complain_of_cycles(graph, steps)
    used = {i for i, full in graph.edges if steps[i][0] is steps[full][0]}  # an artifact of another recipe is one here too
    artifacts = dict.fromkeys(full for full, (file, name) in steps.items() if file.is_artifact(name, is_used=full in used))
    wanted = [full for full in artifacts if steps[full][0] is shelf.files[0]]
    if not wanted and not issues:
        what = "no step is an artifact, so there is nothing to build"
        issues.append(Issue(where=root.where("step"), what=what, hint="write `artifact = true` in one"))
    issues += _bad_wishes(root, only, wanted)
    shelf.check()
    wanted = [full for full in wanted if not only or full in only]
    needed = set(wanted).union(*nx.bfs_layers(graph.reverse(copy=False), wanted))
    position = {full: n for n, full in enumerate(steps)}
    order = [full for full in nx.lexicographical_topological_sort(graph, position.__getitem__) if full in needed]
    made = {full: steps[full][0].steps(steps[full][1], is_artifact=full in artifacts) for full in order}
    planned = {step.name: step for several in made.values() for step in several}
    reached = {i for step in planned.values() for i in step.inputs}
    sources = {file.prefix + name: (file, name) for file in shelf.files for name in file.recipe.table.source if file.prefix + name in reached}
    return Plan(
        recipe=root,
        others={file.prefix.removesuffix("#"): file.recipe for file in shelf.files[1:]},
        architecture=architecture_named(root.table.architecture),
        sources={full: file.recipe.table.source[name] for full, (file, name) in sources.items()},
        steps=planned,
        wanted=tuple(wanted),
        origins={full: Origin(file.recipe, name) for full, (file, name) in (_named(made, steps) | sources).items()},
    )


def _named(made: Mapping[str, Collection[Step]], steps: Mapping[str, tuple[_File, str]]) -> dict[str, tuple[_File, str]]:
    """Tell of every planned step by whom, and under which name, it was said."""
    return {step.name: steps[full] for full, several in made.items() for step in several}


@dataclass(slots=True, kw_only=True)
class _File:
    """One of the recipes that are planned together, and what is wrong with it."""

    recipe: Recipe
    prefix: str  # in front of its names: nothing for the root's, `REL#` for another's
    issues: list[Issue]
    locked: bool = False
    aliases: dict[str, str] = field(default_factory=dict)  # source → the step of another recipe that it is; nothing when there is none
    calls: dict[str, Call | None] = field(default_factory=dict)

    def complain(self, source: str, field: str, *, what: str, hint: str = "") -> None:
        """Say what is wrong with a field of a source."""
        self.issues.append(Issue(where=self.recipe.where("source", source, field), what=f"source `{source}`: {what}", hint=hint))

    def read_steps(self) -> Collection[str]:
        """Read what every step applies to what, and return the names of those that were read."""
        architecture = self.recipe.table.architecture
        self.issues += _bad_sources(self.recipe)
        if is_architecture(architecture):
            reader = StepReader(self.recipe, architecture_named(architecture), own_methods(self.recipe, self.issues, locked=self.locked), self.issues)
            self.calls = {name: reader.call(name, step) for name, step in self.recipe.table.step.items()}
        else:
            names = architecture_names()
            variants = [name for name in names if name.startswith(architecture.partition("/")[0] + "/")]
            hint = "" if variants else nearest(architecture, names)
            hint = hint or f"known are {', '.join(f'`{name}`' for name in variants or ARCHITECTURES)}"
            what = f"architecture `{architecture}` is not known"
            self.issues.append(Issue(where=self.recipe.where("architecture"), what=what, hint=hint))
        return self.calls

    def inputs(self, name: str) -> tuple[str, ...]:
        """List what a step is made of, by names of the plan."""
        call = self.calls[name]
        return tuple(self.aliases.get(i, self.prefix + i) for i in (*call.inputs, *call.parts.values())) if call else ()

    def is_artifact(self, name: str, *, is_used: bool) -> bool:
        """Tell whether a step's result is kept: as it says, or as the defaults say, or when no other step of its recipe uses it."""
        said, default = self.recipe.table.step[name].artifact, self.recipe.table.defaults.artifact
        return said if said is not None else bool(default) or not is_used

    def steps(self, name: str, *, is_artifact: bool) -> tuple[Step, ...]:
        """Complete a step, and the one that comes before it where its components are replaced."""
        full_name, inputs = self.prefix + name, self.inputs(name)
        return complete_steps(self.recipe, name, self.calls[name], full_name=full_name, inputs=inputs, is_artifact=is_artifact)


class _Shelf:
    """Reads a recipe's other recipes, and theirs, each file once, nearest first."""

    def __init__(self, root: Recipe, issues: list[Issue], *, locked: bool) -> None:
        self.files = [_File(recipe=root, prefix="", issues=issues, locked=locked)]
        self._home = root.path.parent.resolve()
        self._known: dict[Path, _File | None] = {root.path.resolve(): self.files[0]}  # by real path; none for what cannot be read
        self._issues = [issues]  # of every file, those that cannot be read too
        for file in self.files:  # which grow
            for name, source in file.recipe.table.source.items():
                if address := _recipe_address(source.uri or ""):
                    file.aliases[name] = self._resolved(file, name, address.file, address.step)

    def check(self) -> None:
        """Raise what is wrong with any file, in the order of files and of their lines."""
        if issues := [issue for issues in self._issues for issue in in_file_order(issues)]:
            raise RecipeError(*issues)

    def _resolved(self, file: _File, name: str, said: str, step: str) -> str:
        """Return the plan's name for a step of another recipe; complain, and return nothing, when there is none."""
        other = self._open(file, name, said)
        if other is None:
            return ""
        table = other.recipe.table
        if step in table.step:
            return other.prefix + step
        what, hint = f"`{said}` has no step `{step}`", nearest(step, table.step)
        if step in table.source:
            what = f"`{step}` is a source of `{said}`, not a step"
            hint = "an address names what a recipe makes; write the source itself here, with its own `path` or `uri`"
        return file.complain(name, "uri", what=what, hint=hint) or ""

    def _open(self, file: _File, name: str, said: str) -> _File | None:
        """Return a recipe that another names, read when it is first named."""
        path = file.recipe.path.parent / said
        real = _real_path(path)
        if real is None:
            return file.complain(name, "uri", what=f"there is no recipe `{said}`", hint="its place is seen from this recipe's folder")
        if real in self._known:
            return self._known[real]
        if len(self._known) == MAX_RECIPES:
            file.complain(name, "uri", what=f"`{said}` is one recipe too many: at most {MAX_RECIPES} are read together")
        self._known[real] = None
        if len(self._known) > MAX_RECIPES:
            return None
        plain = Path(os.path.normpath(path))
        issues: list[Issue] = []
        self._issues.append(issues)
        recipe = _read(plain if _real_path(plain) == real else path, issues)
        if recipe is None:
            return None
        root = self.files[0].recipe.table.architecture
        if recipe.table.architecture != root:
            what = f"`{said}` is of architecture `{recipe.table.architecture}`, but the recipe to be built is of `{root}`"
            file.complain(name, "uri", what=what, hint="recipes that are built together name the same `architecture`")
        self._known[real] = other = _File(recipe=recipe, prefix=f"{self._relative(path)}#", issues=issues, locked=self.files[0].locked)
        self.files.append(other)
        return other

    def _relative(self, path: Path) -> str:
        """Say where a recipe lies, seen from the root's folder: names must not depend on where both lie."""
        there = path.parent.resolve() / path.name
        try:
            return printable(Path(os.path.relpath(there, self._home)).as_posix())
        except ValueError:  # another drive
            return printable(there.as_posix())


def _read(path: Path, issues: list[Issue]) -> Recipe | None:
    """Read a recipe, or what is sound of it; what is wrong with its form is added to `issues`."""
    try:
        return read_recipe(path)
    except RecipeError as error:
        issues += error.issues
        return error.sound if isinstance(error, FormError) else None


def _real_path(path: Path) -> Path | None:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # a path no system knows leads nowhere
        return None


def _recipe_address(uri: str) -> RecipeAddress | None:
    """Read a `recipe:` address; none for other addresses, and for one that nobody can read."""
    try:
        address = parse_uri(uri)
    except UriError:
        return None
    return address if isinstance(address, RecipeAddress) else None


def _bad_sources(recipe: Recipe) -> Iterator[Issue]:
    """Find sources that say nothing they could be found by, an address nobody can read, or what is another recipe's to say."""
    for name, source in recipe.table.source.items():
        if not (source.path or source.filename or source.sha256 or source.blake3 or source.uri):
            what = f"source `{name}` says nothing that it could be found by"
            yield Issue(where=recipe.where("source", name), what=what, hint="write its `path`, or its `filename`, `sha256` or `uri`")
        try:
            page_of(source.uri or "https://none")
        except UriError as error:
            yield Issue(where=recipe.where("source", name, "uri"), what=f"source `{name}`: {error}", hint=error.hint)
        family = recipe.table.architecture.partition("/")[0]
        if source.architecture and not (is_architecture(source.architecture) and source.architecture.partition("/")[0] == family):
            what = f"source `{name}` is of architecture `{source.architecture}`, which is no variant of `{family}`"
            hint = nearest(source.architecture, [n for n in architecture_names() if n.startswith(f"{family}/")])
            yield Issue(where=recipe.where("source", name, "architecture"), what=what, hint=hint)
        shown = {"homepage": source.homepage, "evidence": source.evidence.url if source.evidence else None}
        for place in (place for place, url in shown.items() if url and _SECRET.search(url)):
            what = f"source `{name}`: `{place}` holds a login or a token, and would be published"
            yield Issue(where=recipe.where("source", name, place), what=what, hint="leave it out of the address")
        if _recipe_address(source.uri or ""):
            for said in (key for key in SourceTable.model_fields if key != "uri" and getattr(source, key) is not None):
                what = f"source `{name}` has `{said}`, but it is what the other recipe makes, which says that itself"
                yield Issue(where=recipe.where("source", name, said), what=what, hint=f"leave out `{said}`, or the `recipe:` address")


def _complain_of_cycles(graph: nx.DiGraph[str], steps: Mapping[str, tuple[_File, str]]) -> None:
    """Show each knot of steps that depend on each other, once, as a path with its lines, to the file that the path begins in."""

    def where(full: str) -> str:
        file, name = steps[full]
        return file.recipe.where("step", name)

    for knot in sorted(map(sorted, nx.strongly_connected_components(graph))):
        inside = graph.subgraph(knot)
        if len(knot) == 1 and not inside.size():
            continue
        ring = [edge[0] for edge in nx.find_cycle(inside)]
        first = min(range(len(ring)), key=lambda n: (steps[ring[n]][0].prefix, ring[n]))
        path = [*ring[first:], *ring[:first], ring[first]]
        shown = path if len(path) <= 12 else [*path[:6], "…", *path[-5:]]
        what = f"steps depend on each other: {' → '.join(f'`{n}`' for n in shown)}"
        lines = ", ".join(f"`{n}` at {where(n)}" for n in shown[:-1] if n != "…")
        steps[path[0]][0].issues.append(Issue(where=where(path[0]), what=what, hint=f"the steps are {lines}"))


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
