"""Owns the shapes of factors: what they make together, kind by kind, or why they make nothing.

Has never heard of names or of models. The shapes are those of LyCORIS (`lycoris/modules`), which ComfyUI (`comfy/weight_adapter`) reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Product", "Shape", "UnfitError", "by", "products", "sides"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class UnfitError(Exception):
    """Factors that make nothing together; the text goes on where somebody named them."""


@dataclass(frozen=True, slots=True)
class Product:
    """What factors make: so many rows, of so many elements each."""

    shape: Shape  # as they make it; the dimensions of a convolution may be one
    rows: int  # 0 where any number does
    columns: int = 0  # likewise
    kernel: Shape = ()
    inner: int = 0  # the channels that it multiplies, where it multiplies what is there
    is_whole: bool = False  # whether it is stored as the tensor is shaped


def products(kind: str, shapes: Shapes) -> list[Product]:
    """Return what factors of these shapes make; several where these can be read in several ways. Raises `UnfitError`."""
    for role, shape in shapes.items():
        if role in _SINGLE and math.prod(shape) != 1:
            raise UnfitError(f"has `{role}` of {by(shape)}, which is to be one number")
        if role not in _SINGLE and not math.prod(shape):
            raise UnfitError(f"has `{role}` without a single element")
    return _KINDS[kind](shapes)


def sides(kind: str, shapes: Shapes, part: Shape) -> str:
    """Say why what goes along one side of a tensor does not: DoRA's magnitudes, OFT's scales. Nothing when it does."""
    magnitudes, scales = shapes.get("dora_scale"), shapes.get("rescale")
    if magnitudes is not None and not _goes_along(magnitudes, part, 0) and not (len(magnitudes) > 1 and _goes_along(magnitudes, part, 1)):
        return f"has `dora_scale` of {by(magnitudes)}, along no side of {by(part)}"
    if scales is not None and not _goes_along(scales, part, 0):
        return f"has `rescale` of {by(scales)}, which does not go along the rows of {by(part)}"
    if kind == "boft":
        stages, _, size, _ = shapes["blocks"]
        if stages > part[0].bit_length() or part[0] % (size << (stages - 1)):
            return f"has `blocks` of {stages} stages, which {part[0]} rows do not come apart for"
    return ""


def _goes_along(shape: Shape, part: Shape, side: int) -> bool:
    """Tell whether a shape is that of one number for each row, or for each column."""
    return len(shape) > side and shape[side] == part[side] and math.prod(shape) == part[side]


def by(shape: Shape) -> str:
    """Write a shape down."""
    return "×".join(map(str, shape)) if shape else "one number"


def _matrix(shapes: Shapes, role: str) -> tuple[int, int]:
    """Return a factor's two dimensions; those of a 1×1 convolution are a matrix's."""
    shape = shapes[role]
    if len(shape) < 2 or math.prod(shape[2:]) != 1:
        raise UnfitError(f"has `{role}` of {by(shape)}, which is to be a matrix")
    return shape[0], shape[1]


def _filters(shapes: Shapes, role: str) -> Shape:
    """Return the shape of a factor that may have a convolution's kernel."""
    if len(shapes[role]) < 2:
        raise UnfitError(f"has `{role}` of {by(shapes[role])}, which is to be a matrix or a convolution")
    return shapes[role]


def _same(shapes: Shapes, first: str, a: int, second: str, b: int) -> None:
    """Demand that two factors agree on their rank."""
    if shapes[first][a] != shapes[second][b]:
        raise UnfitError(f"has `{first}` of {by(shapes[first])} and `{second}` of {by(shapes[second])}, whose ranks differ")


def _made(rows: int, *rest: int) -> Product:
    return Product((rows, *rest), rows, math.prod(rest), tuple(rest[1:]))


def _lora(shapes: Shapes) -> list[Product]:
    rows, _ = _matrix(shapes, "up")
    if "mid" not in shapes:
        _, *rest = _filters(shapes, "down")
        _same(shapes, "up", 1, "down", 0)
        return [_made(rows, *rest)]
    _, columns = _matrix(shapes, "down")
    _, _, *kernel = _filters(shapes, "mid")
    _same(shapes, "up", 1, "mid", 0)
    _same(shapes, "mid", 1, "down", 0)
    return [_made(rows, columns, *kernel)]


def _pair(shapes: Shapes, a: str, b: str, core: str) -> Product:
    """Return what two sides make, around a core or without one. With a core, both sides have their ranks first."""
    if core not in shapes:
        rows, _ = _matrix(shapes, a)
        _, columns = _matrix(shapes, b)
        _same(shapes, a, 1, b, 0)
        return _made(rows, columns)
    _, rows = _matrix(shapes, a)
    _, columns = _matrix(shapes, b)
    _, _, *kernel = _filters(shapes, core)
    _same(shapes, a, 0, core, 0)
    _same(shapes, b, 0, core, 1)
    return _made(rows, columns, *kernel)


def _loha(shapes: Shapes) -> list[Product]:
    first, second = _pair(shapes, "w1_a", "w1_b", "t1"), _pair(shapes, "w2_a", "w2_b", "t2")
    if first.shape != second.shape:
        raise UnfitError(f"multiplies {by(first.shape)} by {by(second.shape)}, element by element")
    return [first]


def _lokr(shapes: Shapes) -> list[Product]:
    if "t2" in shapes and "w2_a" not in shapes:
        raise UnfitError("has `t2`, and no `w2_a` that it belongs to")
    small = _made(*_matrix(shapes, "w1")) if "w1" in shapes else _pair(shapes, "w1_a", "w1_b", "")
    large = _made(*_filters(shapes, "w2")) if "w2" in shapes else _pair(shapes, "w2_a", "w2_b", "t2")
    return [_made(small.rows * large.rows, small.shape[1] * large.shape[1], *large.kernel)]


def _glora(shapes: Shapes) -> list[Product]:
    """Read both orders: LyCORIS once wrote `b2 @ b1` and `a2 @ a1`; the rank is the smaller side."""
    for role in ("a1", "a2"):
        _matrix(shapes, role)
    found = []
    for left, right, first, second in (("b1", "b2", "a1", "a2"), ("b2", "b1", "a2", "a1")):
        rows, rank = _filters(shapes, left)[:2]
        _, *rest = _filters(shapes, right)
        inner = shapes[first][0]
        agrees = rank == shapes[right][0] and shapes[first][1] == shapes[second][0] and shapes[second][1] == inner
        if agrees and math.prod(shapes[left][2:]) == 1:
            found.append(Product((rows, *rest), rows, math.prod(rest), tuple(rest[1:]), inner))
    if not found:
        listed = ", ".join(f"`{role}` of {by(shapes[role])}" for role in ("a1", "a2", "b1", "b2"))
        raise UnfitError(f"has {listed}, whose ranks differ")
    return sorted(found, key=lambda product: -product.inner)


def _oft(shapes: Shapes) -> list[Product]:
    blocks = shapes["blocks"]
    if len(blocks) != 3 or blocks[1] != blocks[2]:
        raise UnfitError(f"has `blocks` of {by(blocks)}, which are to be square")
    return [Product((blocks[0] * blocks[1], 0), blocks[0] * blocks[1])]


def _boft(shapes: Shapes) -> list[Product]:
    blocks = shapes["blocks"]
    if len(blocks) != 4 or blocks[2] != blocks[3] or blocks[2] % 2:
        raise UnfitError(f"has `blocks` of {by(blocks)}, which are to be square and even")
    return [Product((blocks[1] * blocks[2], 0), blocks[1] * blocks[2])]


def _ia3(shapes: Shapes) -> list[Product]:
    """Multiply rows or columns: which, only the number in `on_input` says."""
    count = math.prod(shapes["weight"])
    if len(shapes["weight"]) > 1 and shapes["weight"][1] != count:
        raise UnfitError(f"has `weight` of {by(shapes['weight'])}, which is to be one row")
    return [Product((count, 0), count), Product((0, count), 0, inner=count)]


def _whole(role: str) -> Callable[[Shapes], list[Product]]:
    return lambda shapes: [Product(shapes[role], shapes[role][0] if shapes[role] else 0, is_whole=True)]


_SINGLE = ("alpha", "on_input")

_KINDS: Mapping[str, Callable[[Shapes], list[Product]]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
    "ia3": _ia3,
    "diff": _whole("diff"),
    "set": _whole("weight"),
}
