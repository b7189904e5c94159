"""Owns what a step can do: a method is a function whose signature is its schema.

Has never heard of files, blocks or keys. Positional arguments are models, keyword-only arguments are parameters, the first line of
the docstring is the entry in the table of methods. Adding a method adds a function in one file of this folder and a module name below.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["MODULES", "REQUIRED", "Method", "Parameter", "Ratio", "Selection", "method", "methods"]

MODULES = ("linear", "copying")
"""The built-in files of methods, in the order people read about them."""

Ratio = float
"""A share that may differ from tensor to tensor: in recipes a number, or a table over blocks and tensor names."""

Selection = tuple[str, ...]
"""Components of the architecture, or globs over tensor names."""

REQUIRED = inspect.Parameter.empty

Function = TypeVar("Function", bound=Callable[..., Any])
_REGISTERED: dict[str, Method] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A keyword-only argument of a method; `kind` is its annotation: `Ratio`, `list[Ratio]`, `Selection`, `bool`."""

    name: str
    kind: str
    default: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A merge method, as the rest of the program sees it."""

    name: str
    version: int
    function: Callable[..., Any]
    models: tuple[str, ...]  # names of the positional models; empty when any number is taken
    parameters: Mapping[str, Parameter]
    title: str
    selects: Callable[..., bool] | None = None
    """Given a tensor's name, its component and the parameters, tells whether the result has that tensor."""

    @property
    def identity(self) -> str:
        """Return what keys know the method by."""
        return f"{self.name}@{self.version}"


def method(*, version: int, selects: Callable[..., bool] | None = None) -> Callable[[Function], Function]:
    """Register a function as a merge method.

    `version` goes into keys: raise it whenever the same inputs would give other bytes.
    The function must be element-wise and `exact`: made of correctly rounded operations only, so that every machine computes the same bits.
    """

    def register(function: Function) -> Function:
        signature = inspect.signature(function).parameters.values()
        _REGISTERED[function.__name__] = Method(
            name=function.__name__,
            version=version,
            function=function,
            models=tuple(p.name for p in signature if p.kind is p.POSITIONAL_ONLY),
            parameters={p.name: Parameter(name=p.name, kind=str(p.annotation), default=p.default) for p in signature if p.kind is p.KEYWORD_ONLY},
            title=(inspect.getdoc(function) or "").partition("\n")[0],
            selects=selects,
        )
        return function

    return register


@functools.cache
def methods() -> Mapping[str, Method]:
    """Return every method by name, in the order they are listed."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return dict(_REGISTERED)
