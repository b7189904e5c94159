"""Owns the names of number formats: what safetensors calls them, what recipes call them, how wide they are.

Has never heard of torch; arithmetic on them lives in `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FLOATS", "ITEMSIZE", "KEEP", "MERGEABLE", "RECIPE_NAMES", "WHOLE", "Dtypes", "promote", "read_dtypes"]

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

WHOLE = frozenset({"I64", "I32", "I16", "I8", "U8", "BOOL"})
"""Whole numbers that torch can read."""

KEEP = "keep"
"""The recipe word for: as wide as the widest of the models that are merged."""

RECIPE_NAMES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp64": "F64", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2", KEEP: KEEP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dtypes:
    """The dtypes of a step's tensors: one for all, and others for some components; safetensors' names, or `keep`."""

    default: str
    components: Mapping[str, str] = field(default_factory=dict)  # those unlike `default`, sorted

    def of(self, component: str) -> str:
        """Return the dtype of a component's tensors."""
        return self.components.get(component, self.default)

    def __str__(self) -> str:
        return ", ".join([self.default, *(f"{component} {dtype}" for component, dtype in self.components.items())])


def read_dtypes(said: str | Mapping[str, str], otherwise: str) -> Dtypes:
    """Read a recipe's dtype: a name, or a table of components in which `default` is for the rest."""
    if isinstance(said, str):
        return Dtypes(default=RECIPE_NAMES[said])
    default = RECIPE_NAMES[said.get("default", otherwise)]
    named = {component: RECIPE_NAMES[name] for component, name in sorted(said.items()) if component != "default"}
    return Dtypes(default=default, components={component: dtype for component, dtype in named.items() if dtype != default})


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
