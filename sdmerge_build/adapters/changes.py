"""Owns changes: what an adapter does to one tensor of a model, and whether its factors fit that tensor.

Has never heard of how anybody names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sdmerge_build.adapters.products import Product, Shape, UnfitError, by, products, sides

__all__ = ["TAKEN", "Adapter", "Change", "misfit"]

TAKEN = frozenset({"up", "diff", "weight"})
"""The factors whose rows are the rows of what they make: `taken` says which of these are meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an adapter does to one tensor of a model, or to some of its rows."""

    target: str  # the tensor's name in a full checkpoint
    kind: str  # `lora`, `loha`, `lokr`, `glora`, `oft`, `boft`, `ia3`, `diff` or `set`
    factors: Mapping[str, str]  # role → name of the stored tensor
    rows: tuple[int, int] | None = None  # first and count of the target's first dimension: a q, k or v of a fused tensor; None is all
    turned: bool = False  # whether it was made for the transposed tensor, as open_clip stores its text projection
    taken: tuple[int, int] | None = None  # first and count of the rows of `TAKEN` that are meant, where halves change places; None is all
    scale: float = 1.0  # of what a DoRA adds before it is given its lengths, where it is not in an alpha of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a whole adapter does, and what in it nobody understands."""

    changes: Mapping[str, tuple[Change, ...]]  # target → its changes, in order of rows
    strays: tuple[str, ...]  # tensors that match nothing
    incomplete: tuple[str, ...]  # what is wrong with those that do


def misfit(change: Change, shapes: Mapping[str, Shape], shape: Shape) -> str:
    """Say why a change's factors, by role, do not fit a tensor of this shape; nothing when they do."""
    oriented = shape[::-1] if change.turned else shape
    if not oriented:
        return "changes a matrix or a vector, and this is a single number"
    start, count = change.rows or (0, oriented[0])
    if start + count > oriented[0]:
        return f"changes rows {start} to {start + count - 1} of a tensor that has {oriented[0]}"
    part = (count, *oriented[1:])
    try:
        cut = _cut(change, shapes)
        texts = [_mismatch(product, part) for product in products(change.kind, cut)]
        return texts[0] if all(texts) else sides(change.kind, cut, part)
    except UnfitError as error:
        return str(error)


def _cut(change: Change, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Return the shapes of factors without the rows that are not meant."""
    if change.taken is None:
        return shapes
    start, count = change.taken
    for role in TAKEN & shapes.keys():
        if not shapes[role] or start + count > shapes[role][0]:
            raise UnfitError(f"has `{role}` of {by(shapes[role])}, of which rows {start} to {start + count - 1} are meant")
    return {role: (count, *shape[1:]) if role in TAKEN else shape for role, shape in shapes.items()}


def _mismatch(product: Product, part: Shape) -> str:
    """Say how what factors make differs from the part of a tensor that they are for."""
    if product.is_whole:
        same = _bare(product.shape) == _bare(part)
        return "" if same else f"holds {by(product.shape)} for {by(part)}"
    if len(part) < 2:
        return f"makes a matrix, and this has {len(part)} dimension"
    if product.rows and product.rows != part[0]:
        return f"makes {product.rows} rows of {part[0]}"
    if product.columns and (product.columns != math.prod(part[1:]) or (math.prod(product.kernel) > 1 and product.kernel != part[2:])):
        return f"makes {by((product.rows, *product.shape[1:]))} of {by(part)}"
    if product.inner and product.inner != part[1]:
        return f"multiplies {product.inner} channels, where there are {part[1]}"
    return ""


def _bare(shape: Shape) -> Shape:
    """Leave out the ones at the end, which are there for convolutions' sake."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
