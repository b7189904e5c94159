"""Owns the reading of an architecture's table: its variants, and the names that its blocks, parts and lists have.

Has never heard of checkpoints. What a variant says replaces what its family says; its layout and what it is recognised by are added.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdmerge_build.architectures.braces import fill, spell
from sdmerge_build.digest import Digest

__all__ = ["BASE", "fingerprint", "read_blocks", "read_lists", "read_parts", "read_table", "variants_of"]

BASE = "BASE"
"""The block of every tensor that no other block claims: text encoders, VAE, and what is left."""

Prefixes = tuple[str, ...]

_DROPPED = "-"  # in a list: a value that is read and dropped


@functools.cache
def read_table(family: str, variant: str = "") -> dict[str, Any]:
    """Read the table of a family, or of one of its variants."""
    if variant:
        return _varied(read_table(family), read_table(family)["variants"][variant])
    return tomllib.loads(Path(__file__).with_name(f"{family}.toml").read_text(encoding="utf-8"))


def variants_of(family: str, *, with_signs: bool = False) -> list[str]:
    """List the variants of a family, all or those that names and shapes can tell."""
    variants = read_table(family).get("variants", {})
    return [name for name, table in variants.items() if not with_signs or "recognise" in table]


def _varied(family: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    layout, recognise = dict(family["layout"]), dict(family["recognise"])
    for place, tensors in variant.get("layout", {}).items():
        layout[place] = {**layout.get(place, {}), **tensors}
    for kind, names in variant.get("recognise", {}).items():
        recognise[kind] = names if kind == "shapes" else [*recognise.get(kind, ()), *names]
    return {**family, **variant, "layout": layout, "recognise": recognise}


def read_blocks(table: Mapping[str, Any]) -> dict[str, Prefixes]:
    """Read `[blocks]`: BASE, then every block in the order of the table."""
    blocks: dict[str, Prefixes] = {BASE: ()} if "blocks" in table else {}
    for letter, entry in table.get("blocks", {}).items():
        for n in range(entry["count"]):
            blocks[f"{letter}{n:02}"] = tuple(_both(fill(entry["prefix"], {"n": str(n)}), table))
    return blocks


def read_parts(table: Mapping[str, Any]) -> dict[str, tuple[str, Prefixes]]:
    """Read `[parts]`: of each part, the block that it follows, and its prefixes."""
    parts: dict[str, tuple[str, Prefixes]] = {}
    for pattern, entry in table.get("parts", {}).items():
        templates = [entry["prefix"]] if isinstance(entry["prefix"], str) else entry["prefix"]
        for name, bound in spell(pattern):
            prefixes = tuple(prefix for template in templates for prefix in _both(fill(template, bound), table))
            parts[name] = fill(entry["block"], bound), prefixes
    return parts


def _both(prefix: str, table: Mapping[str, Any]) -> Iterator[str]:
    """Yield a prefix, and how it reads in a file that holds nothing but the diffusion model."""
    yield prefix
    if "bare" in table and prefix.startswith(table["bare"]):
        yield prefix.removeprefix(table["bare"])


def read_lists(table: Mapping[str, Any], field: str) -> dict[str, tuple[str, ...]]:
    """Read `[lists]`: the `names` of each list, or how they are `spelled` where it comes from."""
    lists = {}
    for name, entry in table.get("lists", {}).items():
        text = entry if isinstance(entry, str) else entry[field]
        lists[name] = tuple("" if word == _DROPPED else word for pattern in text.split() for word, _ in spell(pattern))
    return lists


def fingerprint(family: str) -> str:
    """Digest what can change a merged tensor: not the title, not the layout of rehearsals, not how people write down block weights."""
    table, digest = read_table(family), Digest()
    for part in ("components", "tensors", "blocks", "parts"):
        digest.fact(part, repr(table.get(part)))
    if "bare" in table:
        digest.fact("bare", repr(table["bare"]))
    return f"{family}@{digest.hexdigest()[:16]}"
