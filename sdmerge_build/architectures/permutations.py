"""Owns which channels of an architecture may change places without changing what the network computes; `permutations.toml` says so.

Has never heard of models or of how channels are matched. Sizes are those of the tensors at hand: only names are known here.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

from sdmerge_build.architectures import architecture_named
from sdmerge_build.architectures.braces import spell

__all__ = ["PERMUTED", "Axis", "Group", "axes_of", "groups_of"]

PERMUTED = ("sd1", "sd2", "sdxl")
"""The architectures whose permutations are known."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where a tensor has the channels of a group: along a dimension, all of it or a part."""

    group: str
    strand: int
    tensor: str
    dim: int
    part: str  # first, middle, last, or nothing

    def start(self, size: int, channels: int) -> int:
        """Return where the channels begin in a dimension of this size."""
        return {"last": size - channels, "middle": (size - channels) // 2}.get(self.part, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Channels that change places together, all over the network."""

    name: str
    strands: tuple[tuple[Axis, ...], ...]
    blocks: int
    width: int  # of a block; 0 where their number is fixed

    @property
    def axes(self) -> tuple[Axis, ...]:
        """List the axes of all strands; the first one has the channels and nothing else."""
        return tuple(axis for strand in self.strands for axis in strand)

    @property
    def tensors(self) -> tuple[str, ...]:
        """List the tensors that must be there, all of them, before any channel may move."""
        return tuple(dict.fromkeys(axis.tensor for axis in self.axes))

    def blocks_of(self, channels: int) -> int:
        """Return how many blocks there are; 0 where the channels cannot be divided into them."""
        size = self.width or (channels // self.blocks)
        return channels // size if size and not channels % size and (self.width or size * self.blocks == channels) else 0

    def holds(self, axis: Axis, shape: Sequence[int], channels: int) -> bool:
        """Tell whether a tensor of this shape has room for the channels, wherever it must hold them."""
        size, times = shape[axis.dim], sum((other.tensor, other.dim) == (axis.tensor, axis.dim) for other in self.axes)
        return size >= channels * times if axis.part else size == channels


@functools.cache
def groups_of(architecture: str) -> tuple[Group, ...]:
    """List the groups of an architecture in the order in which they are matched."""
    table = tomllib.loads(Path(__file__).with_name("permutations.toml").read_text(encoding="utf-8"))
    if architecture not in PERMUTED:
        return ()
    names = list(architecture_named(architecture).layout())
    return tuple(group for entry in table["group"] if architecture in entry.get("only", PERMUTED) for group in _groups(entry, table["lines"], names))


@functools.cache
def axes_of(architecture: str) -> Mapping[str, tuple[Axis, ...]]:
    """List the axes of each tensor that has any."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for group in groups_of(architecture):
        for axis in group.axes:
            axes[axis.tensor] = (*axes.get(axis.tensor, ()), axis)
    return axes


def _groups(entry: Mapping[str, Any], lines: Mapping[str, Sequence[str]], names: Sequence[str]) -> Iterator[Group]:
    """Yield a group for every place that an entry of the table matches."""
    strands = [[line for word in strand for line in lines.get(word, [word])] for strand in entry["strands"]]
    lead = strands[0][0].split()[0]
    known = frozenset(names)
    for found in matching(names, entry["at"] + lead):
        place = found.removesuffix(lead)
        name = f"{place} {entry['name']}"
        read = tuple(tuple(axis for line in strand for axis in _axes(line, place, name, n, names, known)) for n, strand in enumerate(strands))
        width = entry.get("width", 0)
        yield Group(name=name, strands=read, blocks=0 if width else entry.get("blocks", 1), width=width)


def _axes(line: str, place: str, group: str, strand: int, names: Sequence[str], known: frozenset[str]) -> Iterator[Axis]:
    """Yield the axes that one line of the table stands for."""
    pattern, dim, *part = line.split()
    for spelled, _ in spell(pattern):
        full = f"{place}{spelled}" if spelled.startswith(".") else spelled
        found = matching(names, full) if "*" in full else [full]
        assert "*" in full or full in known, f"BUG: {full} is no tensor"
        for tensor in found:
            yield Axis(group, strand, tensor, int(dim), part[0] if part else "")
