"""Owns what is known of a family of checkpoints: how to recognise it, its components, its blocks.

Has never heard of recipes or methods; an architecture is one TOML table beside this file, and adding one adds a file and a name below.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmerge_build.architectures.layout import Shape, expand
from sdmerge_build.digest import Digest

if TYPE_CHECKING:
    from sdmerge_build.architectures.diffusers import FolderNames

__all__ = ["ARCHITECTURES", "BASE", "GENERIC", "Architecture", "architecture_named", "folder_names", "recognise", "recognise_folder"]

ARCHITECTURES = ("sd1", "sdxl", "generic")
GENERIC = "generic"
BASE = "BASE"
"""The block of every tensor that no other block claims: text encoders, VAE, and what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of checkpoints. `generic` is the family of everything: no blocks, no components."""

    name: str
    title: str
    modelspec: str
    resolution: str
    present: tuple[str, ...]
    absent: tuple[str, ...]
    components: Mapping[str, tuple[str, ...]]
    constants: tuple[str, ...]
    optional: tuple[str, ...]
    blocks: Mapping[str, str]  # name → prefix, in the order people count them; BASE first, with no prefix
    parts: Mapping[str, tuple[str, str]]  # name → (block it follows, prefix)
    fingerprint: str

    def component_of(self, tensor: str) -> str:
        """Name the component a tensor belongs to: `unet`, `vae`, …, or `other`."""
        for component, prefixes in self.components.items():
            if tensor.startswith(prefixes):
                return component
        return "other"

    def block_of(self, tensor: str) -> tuple[str, str | None]:
        """Name the block a tensor is counted under, and the named part of it, if any."""
        for part, (block, prefix) in self.parts.items():
            if tensor.startswith(prefix):
                return block, part
        for block, prefix in self.blocks.items():
            if prefix and tensor.startswith(prefix):
                return block, None
        return BASE, None

    def is_constant(self, tensor: str) -> bool:
        """Tell whether a tensor is copied and never averaged, such as `position_ids`."""
        return any(fnmatchcase(tensor, glob) for glob in self.constants)

    def may_lack(self, tensor: str) -> bool:
        """Tell whether a checkpoint without this tensor is still complete."""
        return self.is_constant(tensor) or any(fnmatchcase(tensor, glob) for glob in self.optional)

    def fits(self, names: Collection[str]) -> bool:
        """Tell whether a file with these tensors is of this architecture."""
        return all(n in names for n in self.present) and not any(n in names for n in self.absent)

    def layout(self) -> dict[str, Shape]:
        """List the tensors of a full checkpoint, as rehearsals need them."""
        return expand(_table(self.name)["layout"], _table("parts"))


@functools.cache
def architecture_named(name: str) -> Architecture:
    """Load one of `ARCHITECTURES`."""
    table = _table(name)
    tensors = table.get("tensors", {})
    recognise_by = table.get("recognise", {})
    return Architecture(
        name=name,
        title=table["title"],
        modelspec=table["modelspec"],
        resolution=table["resolution"],
        present=tuple(recognise_by.get("present", ())),
        absent=tuple(recognise_by.get("absent", ())),
        components={k: tuple(v) for k, v in table.get("components", {}).items()},
        constants=tuple(tensors.get("constants", ())),
        optional=tuple(tensors.get("optional", ())),
        blocks=_blocks(table.get("blocks", {})),
        parts={k: (v["block"], v["prefix"]) for k, v in table.get("parts", {}).items()},
        fingerprint=_fingerprint(name, table),
    )


def recognise(names: Collection[str]) -> Architecture:
    """Tell the architecture of a file from its tensor names; `generic` when none fits."""
    for name in ARCHITECTURES:
        architecture = architecture_named(name)
        if architecture.present and architecture.fits(names):
            return architecture
    return architecture_named(GENERIC)


@functools.cache
def folder_names(name: str) -> FolderNames | None:
    """Load the names that an architecture's tensors have in a diffusers folder; None when they are not known."""
    from sdmerge_build.architectures.diffusers import read_names  # noqa: PLC0415  most runs meet no folder

    table = _table(name).get("diffusers")
    return read_names(name, table, _table("diffusers"), architecture_named(name).layout()) if table else None


def recognise_folder(names: Collection[str]) -> FolderNames | None:
    """Tell whose names a diffusers folder has, from its `component.name`s; None when nobody's that are known."""
    known = (folder_names(name) for name in ARCHITECTURES)
    return next((naming for naming in known if naming and naming.fits(names)), None)


@functools.cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def _blocks(table: Mapping[str, Any]) -> dict[str, str]:
    blocks = {BASE: ""} if table else {}
    for letter, entry in table.items():
        for n in range(entry["count"]):
            blocks[f"{letter}{n:02}"] = entry["prefix"].replace("{n}", str(n))
    return blocks


def _fingerprint(name: str, table: Mapping[str, Any]) -> str:
    """Digest what can change a merged tensor: not the title, and not the layout of rehearsals."""
    digest = Digest()
    for part in ("components", "tensors", "blocks", "parts"):
        digest.fact(part, repr(table.get(part)))
    return f"{name}@{digest.hexdigest()[:16]}"
