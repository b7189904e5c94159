"""Owns what adapters call the modules of an architecture: which spelling stands for which tensor, or for which of its rows.

Has never heard of factors. Names are spelled out from the architecture's layout and looked up whole, so underscores leave nothing to guess.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdmerge_build.architectures import GENERIC, Architecture, architecture_named, diffusers_names
from sdmerge_build.architectures.diffusers import STACKED, SWAPPED, TRANSPOSED, FolderNames, Place
from sdmerge_build.architectures.tables import variants_of

__all__ = ["BIAS", "PREFIXES", "WEIGHT", "Spellings", "Spot", "names_table", "spellings_of"]

WEIGHT, BIAS = "weight", "bias"

PREFIXES = ("lora_", "lycoris_", "oft_")
"""What names begin with in adapters alone; underscores follow."""

_WRAPPER = "base_model_model_"  # what PEFT puts before the names of whatever it wraps
_PARAMETERS = {"weight": WEIGHT, "scale": WEIGHT, "bias": BIAS}


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a module's weight or bias is in a checkpoint."""

    target: str
    part: tuple[int, int, int] | None = None  # its share of the rows: first and count of how many; None is all
    is_turned: bool = False
    is_swapped: bool = False  # whether the halves of its rows come in the other order


Spots = dict[tuple[str, str], Spot | None]
"""Module with underscores, weight or bias → where; None where variants of a family differ."""


@dataclass(frozen=True, slots=True)
class Spellings:
    """What the modules of an architecture are called: by component, what names begin with, and how they go on."""

    components: tuple[tuple[tuple[str, ...], Spots], ...]

    def find(self, module: str, parameter: str) -> tuple[Spot | None, ...]:
        """List where a module's weight or bias may be: one spot, none when nothing is called so, several or None when it cannot be told."""
        flat = _flat(module.replace(".processor.", ".")).removeprefix(_WRAPPER)
        found = [
            spots[rest, parameter]
            for prefixes, spots in self.components
            for prefix in prefixes
            if flat.startswith(prefix) and ((rest := flat.removeprefix(prefix).removeprefix(_WRAPPER)), parameter) in spots
        ]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class _AsTheyAre(Spellings):
    """The spellings of any model at all: a module's own name, with its dots."""

    def find(self, module: str, parameter: str) -> tuple[Spot | None, ...]:
        name = module.removeprefix("base_model.model.")
        return () if name.startswith(PREFIXES) else (Spot(f"{name}.{parameter}"),)


@functools.cache
def names_table() -> Mapping[str, Any]:
    """Load the table of names."""
    return tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))


def spellings_of(architecture: Architecture) -> Spellings:
    """Return what adapters call the modules of an architecture. A family whose variants differ has the names of all."""
    if architecture.name == GENERIC:
        return _AsTheyAre(())
    if architecture.variant or architecture.depth:
        return _spelled((_full_name(architecture),))
    return _spelled(tuple(f"{architecture.name}/{variant}" for variant in variants_of(architecture.name)))


def _full_name(architecture: Architecture) -> str:
    return f"{architecture.name}/{architecture.variant}".removesuffix("/")


@functools.cache
def _spelled(names: tuple[str, ...]) -> Spellings:
    """Spell out the modules of variants of one family."""
    family, _, _ = names[0].partition("/")
    layouts = {name: tuple(architecture_named(name).layout()) for name in names}
    components = []
    for component, entry in names_table()["components"][family].items():
        spots: Spots = {}
        for name, layout in layouts.items():
            for module, spot in _component(diffusers_names(name), layout, component, entry).items():
                spots[module] = spot if spots.get(module, spot) == spot else None
        prefixes = (_flat(prefix) for prefix in (*entry["prefixes"], entry["original"]))
        components.append((tuple(dict.fromkeys(prefixes)), spots))
    return Spellings(tuple(components))


def _component(naming: FolderNames | None, layout: Sequence[str], component: str, entry: Mapping[str, Any]) -> dict[tuple[str, str], Spot]:
    """Spell out the modules of a component: as checkpoints do, and over it as diffusers does, where both use the same letters."""
    prefix = entry["original"]
    tensors = [*layout, *(prefix + extra for extra in entry.get("extra", ()))]
    named = {tensor.removeprefix(prefix): Spot(tensor) for tensor in tensors if tensor.startswith(prefix)}
    if naming:
        named |= {theirs: _spot(ours, naming.places[ours], n) for (where, theirs), (ours, n) in naming.originals.items() if where == component}
    spots = {module: spot for tensor, spot in named.items() for module in _modules(tensor)}
    return {**dict(_also(spots)), **spots}


def _spot(target: str, place: Place, n: int) -> Spot:
    """Turn around where diffusers keeps a tensor, or one of those it is made of."""
    part = (sum(place.sizes[:n]), place.sizes[n], sum(place.sizes)) if place.how == STACKED else None
    return Spot(target, part, place.how == TRANSPOSED, place.how == SWAPPED)


def _modules(tensor: str) -> Iterator[tuple[str, str]]:
    """Yield the module that a tensor belongs to, and which of its two it is; a tensor with a name of its own is one itself."""
    module, _, parameter = tensor.rpartition(".")
    if parameter in _PARAMETERS:
        yield _flat(module), _PARAMETERS[parameter]
    if parameter not in {WEIGHT, BIAS}:
        yield _flat(tensor), WEIGHT


def _also(spots: Mapping[tuple[str, str], Spot]) -> Iterator[tuple[tuple[str, str], Spot]]:
    """Yield modules under other names."""
    endings = [
        (f"_{_flat(ending)}", f"_{_flat(other)}", tuple(also.get("part", ())))
        for also in names_table()["also"]
        for other, ending in also["names"].items()
    ]
    last = {ending.rpartition("_")[2] for ending, _, _ in endings}
    for (module, parameter), spot in spots.items():
        if module.rpartition("_")[2] not in last:
            continue
        for ending, other, part in endings:
            if module.endswith(ending):
                yield (module.removesuffix(ending) + other, parameter), replace(spot, part=part) if part else spot


def _flat(name: str) -> str:
    return name.replace(".", "_")
