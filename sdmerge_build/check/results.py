"""Owns what a check yields: every tensor of every step and how it is made, every change of every adapter, and what does not fit.

Has never heard of how it is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdmerge_build.adapters import Change
from sdmerge_build.adapters.writing import Module
from sdmerge_build.architectures.made import Made
from sdmerge_build.blend import Blend
from sdmerge_build.errors import Issue
from sdmerge_build.tensorfile import Spec

__all__ = ["Checked", "Complain", "Draft", "Operation", "Strength"]

Complain = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Strength:
    """A change of an adapter, and how strongly it is applied."""

    adapter: str  # the source or step whose file holds the factors
    change: Change
    strength: float

    def times(self, factor: float) -> Strength:
        """Apply it more or less strongly."""
        return Strength(self.adapter, self.change, self.strength * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A module of an adapter that is to be made."""

    module: Module
    tensor: str  # what the models that it is extracted from call its target
    dtype: str
    most: int  # its rank, or the most that it may be
    is_fixed: bool  # whether the rank is known before there are numbers
    params: Mapping[str, Any]  # numbers for this tensor
    parts: tuple[Strength, ...]  # the changes that it is made of; none where it is a difference of models


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """How one tensor of a step is made."""

    dtype: str  # of the result
    shape: tuple[int, ...]  # of the result
    area: tuple[int, ...]  # of what is computed; smaller than `shape` where only what models have in common is merged
    copied: int | None  # the input whose tensor this is, exactly; None when it is computed
    reads: tuple[int, ...]  # the inputs that matter
    params: Mapping[str, Any]  # numbers for this tensor
    blend: Blend | None  # each input's share, where the method is linear
    changes: tuple[Strength, ...] = ()  # what adapters do to it afterwards, in order
    moved: Made | None = None  # how a copied tensor is made of the input's, where it is not the one of its own name


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Every tensor of every source and step, how steps make them, and what does not fit."""

    tensors: dict[str, Mapping[str, Spec]] = field(default_factory=dict)  # of models
    adapters: dict[str, Mapping[str, tuple[Strength, ...]]] = field(default_factory=dict)  # of adapters: target → changes
    factors: dict[str, Mapping[str, Spec]] = field(default_factory=dict)  # what an adapter's file holds
    stored: dict[str, Mapping[str, Made]] = field(default_factory=dict)  # of sources that name tensors unlike a checkpoint: how each is made
    drafts: dict[str, tuple[Draft, ...]] = field(default_factory=dict)  # of adapters that are made as files
    operations: dict[str, dict[str, Operation]] = field(default_factory=dict)
    issues: dict[str, list[Issue]] = field(default_factory=dict)  # by the source or step they concern
    notes: list[str] = field(default_factory=list)

    def knows(self, name: str) -> bool:
        """Tell whether a source or step is sound."""
        return name not in self.issues and (name in self.tensors or name in self.adapters)
