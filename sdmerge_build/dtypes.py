"""Owns the names of number formats: what safetensors calls them, what recipes call them, how wide they are.

Has never heard of torch; arithmetic on them lives in `merge`.
"""

from __future__ import annotations

__all__ = ["FLOATS", "ITEMSIZE", "KEEP", "MERGEABLE", "RECIPE_NAMES", "promote"]

ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
"""Bytes per element of every dtype of the safetensors format that fills whole bytes."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"})

MERGEABLE = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Dtypes that arithmetic can read."""

KEEP = "keep"
"""The recipe word for: as wide as the widest of the models that are merged."""

RECIPE_NAMES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp64": "F64", KEEP: KEEP}


def promote(first: str, second: str) -> str:
    """Return the narrowest dtype that holds both, as torch promotes floating tensors.

    >>> promote("F16", "BF16"), promote("F16", "F32")
    ('F32', 'F32')
    """
    if first == second:
        return first
    wide = max(ITEMSIZE[first], ITEMSIZE[second])
    if wide == 8:
        return "F64"
    if wide == 4 or {first, second} == {"F16", "BF16"}:
        return "F32"
    return first if ITEMSIZE[first] == wide else second
