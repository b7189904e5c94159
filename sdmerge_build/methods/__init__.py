"""Owns what a step can do: a method is a function whose signature is its schema.

Has never heard of files, blocks or keys. Positional arguments are models, keyword-only arguments are parameters, the first line of
the docstring is the entry in the table of methods. Adding a method adds a function in one file of this folder and a module name below.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

__all__ = [
    "CUTS",
    "MODULES",
    "RANGES",
    "REQUIRED",
    "Findings",
    "Method",
    "Parameter",
    "Place",
    "Positive",
    "Ratio",
    "Seed",
    "Selection",
    "Survey",
    "Unit",
    "collecting",
    "method",
    "methods",
]

MODULES = (
    "linear",
    "similarity",
    "difference",
    "task_vectors",
    "sparse",
    "centers",
    "low_rank",
    "structural",
    "spherical",
    "rebasin",
    "finishing",
    "copying",
    "parts",
    "baking",
    "extraction",
)
"""The built-in files of methods, in the order people read about them."""

Ratio = Annotated[float, "Ratio"]
"""A share that may differ from tensor to tensor: in recipes a number, or a table over blocks and tensor names."""

Unit = Annotated[float, "Unit"]
"""A ratio from 0 to 1."""

Positive = Annotated[float, "Positive"]
"""A ratio that is not negative."""

Seed = Annotated[int, "Seed"]
"""A whole number from 0 to 2^63 - 1."""

Selection = Annotated[tuple[str, ...], "Selection"]
"""Components of the architecture, or globs over tensor names."""

Findings = Annotated[Mapping[str, Any], "Findings"]
"""What a method's survey of whole models found: numbers, texts and lists of them."""

RANGES: Mapping[str, tuple[float, float]] = {"Ratio": (-math.inf, math.inf), "Unit": (0.0, 1.0), "Positive": (0.0, math.inf)}
"""The kinds of ratios, and what they may be."""

_KINDS = (*RANGES, *(f"list[{kind}]" for kind in RANGES), "Selection", "Seed", "int", "bool")

CUTS = ("anywhere", "rows", "filters", "nowhere")
"""Where the engine may cut a tensor into the slices that a method sees.

`anywhere`: flat slices. `rows`: (rows, length), whole rows of the last dimension; a vector is one row. `filters`: (entries, rest), whole
entries of the first dimension. `nowhere`: the tensor in its own shape, which takes the memory that it takes.
"""

REQUIRED = inspect.Parameter.empty

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a slice lies; a method asks for it by a keyword-only argument with this annotation."""

    name: str  # of the tensor
    shape: tuple[int, ...]  # of the tensor
    start: int  # position of the first element that the method sees in the flat tensor
    count: int  # elements that it sees
    architecture: str

    @property
    def numel(self) -> int:
        """Count the tensor's elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A keyword-only argument of a method.

    `kind` is its annotation: a name in `RANGES`, a list of one, `Selection`, `Seed`, `int`, `bool`; or `word`, one of some.
    """

    name: str
    kind: str
    default: Any
    words: tuple[str, ...] = ()  # what a `word` may be

    @property
    def ratio(self) -> str | None:
        """Name the kind of ratio that this is, or is a list of."""
        kind = self.kind.removeprefix("list[").removesuffix("]")
        return kind if kind in RANGES else None

    @property
    def is_list(self) -> bool:
        """Tell whether there is one value per model of `models`."""
        return self.kind.startswith("list[")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What must be known of whole models before any tensor is merged.

    `function(models, **parameters)` gets a view of the step's models and returns `Findings`. It is computed once per models and
    `parameters` (the method's own, by name) and kept; `version` is raised when it would find something else.
    """

    name: str
    version: int
    function: Callable[..., Findings]
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A merge method, as the rest of the program sees it."""

    name: str
    version: int
    function: Callable[..., Any]
    models: tuple[str, ...]  # names of the positional models
    rest: str = ""  # what may follow them in any number: `models` or `adapters`
    parameters: Mapping[str, Parameter]
    title: str
    selects: Callable[..., bool] | None = None
    """Given a tensor's name, its component and the parameters, tells whether the result has that tensor."""
    moves: Callable[..., Any] | None = None
    """Given the models' names and shapes, the architecture and the parameters, tells of which tensors each of the result is made, unchanged."""
    gathers: str = ""  # what it calls models that are given under the names of components
    cut: str = "anywhere"
    reach: int = 0
    """How many filters before and after those of a slice it must see as well, where there are any; what it makes of them is thrown away."""
    makes_adapter: bool = False
    """Whether its result is an adapter, which is made in one piece, and not by its function."""
    pinned: bool = False
    """Whether its bytes are promised for one version of torch on one kind of machine only; otherwise it is `exact`."""
    survey: Survey | None = None
    needs: str = ""  # a package that is not installed with sdbuild, but with its extra of the method's name
    place: str = ""  # the argument that wants to know where the slice lies
    findings: str = ""  # the argument that takes what the survey found
    origin: str = ""
    """For methods that are not built in: the digest of the file they come from."""

    @property
    def identity(self) -> str:
        """Return what keys know the method by."""
        return f"{self.name}@{self.version}{f' {self.origin}' if self.origin else ''}"

    @property
    def roles(self) -> tuple[str, ...]:
        """Name the fields of a step that hold models."""
        return (*self.models, *filter(None, [self.rest]))

    @property
    def is_open(self) -> bool:
        """Tell whether it takes any number of models or adapters."""
        return bool(self.rest)


_BUILT_IN: dict[str, Method] = {}
_collected: contextvars.ContextVar[dict[str, Method]] = contextvars.ContextVar("_collected", default=_BUILT_IN)


def method(
    *,
    version: int,
    selects: Callable[..., bool] | None = None,
    moves: Callable[..., Any] | None = None,
    cut: str = "anywhere",
    reach: int = 0,
    makes_adapter: bool = False,
    pinned: bool = False,
    survey: Survey | None = None,
    needs: str = "",
) -> Callable[[Function], Function]:
    """Register a function as a merge method.

    `version` goes into keys: raise it whenever the same inputs would give other bytes.
    The function must be made of correctly rounded operations only, so that every machine computes the same bits, unless it is `pinned`.
    One that needs facts of the whole tensor is a generator: it yields measures (`methods/measures.py`), is sent their answers, and returns.
    """
    if cut not in CUTS:
        message = f"tensors are cut {', '.join(CUTS)}, not {cut}"
        raise ValueError(message)

    def register(function: Function) -> Function:
        signature = inspect.signature(function).parameters.values()
        if reach and (cut != "filters" or inspect.isgeneratorfunction(function)):
            message = "a method that sees neighbours is cut between filters, and asks nothing of the whole tensor"
            raise ValueError(message)
        if function.__name__ in _collected.get():
            message = f"there is a method `{function.__name__}` already"
            raise ValueError(message)
        if unknown := [name for name in (survey.parameters if survey else ()) if name not in {p.name for p in signature}]:
            message = f"its survey asks for `{unknown[0]}`, which `{function.__name__}` does not have"
            raise ValueError(message)
        keywords = {p.name: _named(p.annotation) for p in signature if p.kind is p.KEYWORD_ONLY}
        _collected.get()[function.__name__] = Method(
            name=function.__name__,
            version=version,
            function=function,
            models=tuple(p.name for p in signature if p.kind is p.POSITIONAL_ONLY),
            rest=next((p.name for p in signature if p.kind is p.VAR_POSITIONAL), ""),
            parameters={p.name: _parameter(p) for p in signature if keywords.get(p.name, "Place") not in {"Place", "Findings"}},
            title=(inspect.getdoc(function) or "").partition("\n")[0],
            selects=selects,
            moves=moves,
            gathers=next((p.name for p in signature if p.kind is p.VAR_KEYWORD), ""),
            cut=cut,
            reach=reach,
            makes_adapter=makes_adapter,
            pinned=pinned,
            survey=survey,
            needs=needs,
            place=next((name for name, kind in keywords.items() if kind == "Place"), ""),
            findings=next((name for name, kind in keywords.items() if kind == "Findings"), ""),
        )
        return function

    return register


def _named(annotation: Any) -> str:
    """Name an annotation as it is written, whether it was evaluated or not."""
    if isinstance(annotation, str):
        return annotation
    if marks := getattr(annotation, "__metadata__", None):
        return str(marks[0])
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(map(repr, inner))}]"
    return f"list[{_named(inner[0])}]" if get_origin(annotation) is list else getattr(annotation, "__name__", str(annotation))


def _parameter(argument: inspect.Parameter) -> Parameter:
    kind = _named(argument.annotation)
    if kind.startswith("Literal["):
        words = ast.literal_eval(f"({kind[len('Literal[') : -1]},)")
        return Parameter(name=argument.name, kind="word", default=argument.default, words=words)
    if kind not in _KINDS:
        said = "has no annotation" if argument.annotation is argument.empty else f"is a `{kind}`"
        message = f"`{argument.name}` {said}; fields are {', '.join(_KINDS)} or Literal[…]"
        raise TypeError(message)
    return Parameter(name=argument.name, kind=kind, default=argument.default)


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Method]]:
    """Provide the methods that are registered meanwhile, by name."""
    found: dict[str, Method] = {}
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


@functools.cache
def methods() -> Mapping[str, Method]:
    """Return every built-in method by name, in the order they are listed."""
    modules = [importlib.import_module(f"{__name__}.{module}").__name__ for module in MODULES]
    return dict(sorted(_BUILT_IN.items(), key=lambda entry: modules.index(entry[1].function.__module__)))
