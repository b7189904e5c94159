"""Owns what is known of a family of checkpoints: how to recognise it, its components, its blocks.

Has never heard of recipes or methods; an architecture is one TOML table beside this file, and adding one adds a file and a name below.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from sdmerge_build.architectures.layout import Shape, expand
from sdmerge_build.architectures.tables import BASE, fingerprint, read_blocks, read_lists, read_parts, read_table, variants_of

if TYPE_CHECKING:
    from sdmerge_build.architectures.diffusers import FolderNames

__all__ = [
    "ARCHITECTURES",
    "BASE",
    "GENERIC",
    "OURS",
    "Architecture",
    "Shaped",
    "architecture_named",
    "architecture_names",
    "diffusers_names",
    "folder_names",
    "is_architecture",
    "recognise",
    "recognise_folder",
]

ARCHITECTURES = ("sd1", "sd2", "sdxl", "sdxl-refiner", "sd3", "flux", "generic")
"""The families. A recipe names one, or one of its variants: `sd3/3.5-large`."""

GENERIC = "generic"

OURS = "mbw@1"
"""The block map that parts follow unless a recipe says another."""


class Shaped(Protocol):
    """What a file says of a tensor, as far as it is looked at here."""

    @property
    def shape(self) -> Shape:
        """Its dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of checkpoints, or one variant of it. `generic` is the family of everything: no blocks, no components."""

    name: str  # of the family
    variant: str  # nothing when any will do
    title: str
    modelspec: str
    resolution: str
    present: tuple[str, ...]
    absent: tuple[str, ...]
    shapes: Mapping[str, Shape]  # of tensors whose shape tells a variant
    bare: str  # what names in a file that holds nothing but the diffusion model leave out
    components: Mapping[str, tuple[str, ...]]
    constants: tuple[str, ...]
    optional: tuple[str, ...]
    blocks: Mapping[str, tuple[str, ...]]  # name → prefixes, in the order people count them; BASE first, with none
    parts: Mapping[str, tuple[str, tuple[str, ...]]]  # name → block it follows, prefixes
    depth: tuple[str, ...]  # the blocks that are layers, in order; none in a family whose variants have more and fewer
    lists: Mapping[str, tuple[str, ...]]  # orders in which people write down weights: blocks and parts, "" for a value that is dropped
    spelled: Mapping[str, tuple[str, ...]]  # the same lists, in the words of the tool they come from
    maps: Mapping[str, Mapping[str, str]]  # tool@version → part → the block it follows there, "" where it is not merged; else as in `parts`
    fingerprint: str  # of the family: variants differ in nothing that it digests
    owners: Mapping[str, tuple[str, str | None]] = field(repr=False)  # prefix → block and part
    lengths: tuple[int, ...] = field(repr=False)  # of these prefixes, longest first

    def component_of(self, tensor: str) -> str:
        """Name the component a tensor belongs to: `unet`, `vae`, …, or `other`."""
        for component, prefixes in self.components.items():
            if tensor.startswith(prefixes):
                return component
        return "other"

    def block_of(self, tensor: str) -> tuple[str, str | None]:
        """Name the block a tensor is counted under, and the named part of it, if any. The longest prefix decides."""
        for length in self.lengths:
            if owner := self.owners.get(tensor[:length]):
                return owner
        return BASE, None

    def is_constant(self, tensor: str) -> bool:
        """Tell whether a tensor is copied and never averaged, such as `position_ids`."""
        return any(fnmatchcase(tensor, glob) for glob in self.constants)

    def may_lack(self, tensor: str) -> bool:
        """Tell whether a checkpoint without this tensor is still complete."""
        return self.is_constant(tensor) or any(fnmatchcase(tensor, glob) for glob in self.optional)

    def fits(self, tensors: Mapping[str, Shaped]) -> bool:
        """Tell whether a file with these tensors is of this architecture."""
        return (
            not self.lacking(tensors)
            and not any(self._find(name, tensors) for name in self.absent)
            and all((found := self._find(name, tensors)) and tensors[found].shape == shape for name, shape in self.shapes.items())
        )

    def lacking(self, tensors: Mapping[str, Shaped]) -> list[str]:
        """List what every file of this architecture has, and this one has not."""
        return [name for name in self.present if not self._find(name, tensors)]

    def _find(self, name: str, tensors: Mapping[str, Shaped]) -> str:
        """Return what a tensor is called in a file, or nothing when it is not there."""
        return next((spelling for spelling in (name, name.removeprefix(self.bare)) if spelling in tensors), "")

    def layout(self) -> dict[str, Shape]:
        """List the tensors of a full checkpoint, as rehearsals need them; of a family, those of its typical variant."""
        variant = self.variant or read_table(self.name).get("typical", "")
        return expand(read_table(self.name, variant)["layout"], read_table("parts"))


def is_architecture(name: str) -> bool:
    """Tell whether a recipe may name this architecture: a family, or `family/variant`."""
    family, slash, variant = name.partition("/")
    return family in ARCHITECTURES and (variant in variants_of(family) if slash else True)


def architecture_names() -> list[str]:
    """List what a recipe may name: every family, and after it its variants."""
    return [name for family in ARCHITECTURES for name in (family, *(f"{family}/{variant}" for variant in variants_of(family)))]


@functools.cache
def architecture_named(name: str) -> Architecture:
    """Load one of `architecture_names`."""
    family, _, variant = name.partition("/")
    table = read_table(family, variant)
    tensors, signs = table.get("tensors", {}), table.get("recognise", {})
    blocks, parts = read_blocks(table), read_parts(table)
    owners: dict[str, tuple[str, str | None]] = {prefix: (block, None) for block, prefixes in blocks.items() for prefix in prefixes}
    owners |= {prefix: (block, part) for part, (block, prefixes) in parts.items() for prefix in prefixes}
    is_of_one_depth = variant or not any("blocks" in read_table(family)["variants"][v] for v in variants_of(family))
    return Architecture(
        name=family,
        variant=variant,
        title=table["title"],
        modelspec=table["modelspec"],
        resolution=table["resolution"],
        present=tuple(signs.get("present", ())),
        absent=tuple(signs.get("absent", ())),
        shapes={tensor: tuple(shape) for tensor, shape in signs.get("shapes", {}).items()},
        bare=table.get("bare", ""),
        components={k: tuple(v) for k, v in table.get("components", {}).items()},
        constants=tuple(tensors.get("constants", ())),
        optional=tuple(tensors.get("optional", ())),
        blocks=blocks,
        parts=parts,
        depth=tuple(block for block in blocks if block != BASE) if is_of_one_depth else (),
        lists=read_lists(table, "names"),
        spelled=read_lists(table, "spelled"),
        maps={OURS: {}, **table.get("maps", {})} if blocks else {},
        fingerprint=fingerprint(family),
        owners=owners,
        lengths=tuple(sorted({len(prefix) for prefix in owners}, reverse=True)),
    )


def recognise(tensors: Mapping[str, Shaped]) -> Architecture:
    """Tell the architecture of a file, and its variant where the file shows it; `generic` when none fits."""
    for name in ARCHITECTURES:
        family = architecture_named(name)
        if family.present and family.fits(tensors):
            variants = (architecture_named(f"{name}/{variant}") for variant in variants_of(name, with_signs=True))
            return next((variant for variant in variants if variant.fits(tensors)), family)
    return architecture_named(GENERIC)


def folder_names(name: str) -> FolderNames | None:
    """Load the names that an architecture's tensors have in a diffusers folder; None when such folders are not read."""
    return diffusers_names(name) if "present" in read_table(name).get("diffusers", {}) else None


@functools.cache
def diffusers_names(name: str) -> FolderNames | None:
    """Load the names that diffusers has for the tensors of a family or a variant, folders or not; None when they are not known."""
    from sdmerge_build.architectures.diffusers import read_names  # noqa: PLC0415  most runs need none

    family, _, variant = name.partition("/")
    table = read_table(family, variant or read_table(family).get("typical", ""))
    if "diffusers" not in table:
        return None
    layout = architecture_named(name).layout()
    return read_names(name, table["diffusers"], read_table("diffusers"), layout, frozenset(table.get("swapped", ())))


def recognise_folder(names: Collection[str]) -> FolderNames | None:
    """Tell whose names a diffusers folder has, from its `component.name`s; None when nobody's that are known."""
    known = (folder_names(name) for name in ARCHITECTURES)
    return next((naming for naming in known if naming and naming.fits(names)), None)
