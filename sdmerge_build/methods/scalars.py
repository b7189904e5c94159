"""Owns the functions of single numbers that Python would leave to the C library, whose last bit differs from system to system.

Has never heard of tensors. Each value is computed to 200 bits and rounded to a float once; + - * / and `math.sqrt` need no help.
Edges are those of `math`, but what is too large is inf, not an error.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

__all__ = ["acos", "cos", "exp", "log", "power", "sin"]

_BITS = 200


def sin(x: float) -> float:
    """Return the sine of an angle in radians."""
    return _rounded("sin", x) if math.isfinite(x) else math.nan


def cos(x: float) -> float:
    """Return the cosine of an angle in radians."""
    return _rounded("cos", x) if math.isfinite(x) else math.nan


def acos(x: float) -> float:
    """Return the angle of 0…π whose cosine is x; clamp x to -1…1 before."""
    if abs(x) > 1:
        raise ValueError(f"BUG: no angle has the cosine {x!r}")
    return _rounded("acos", x)


def exp(x: float) -> float:
    """Return e to the x."""
    return _rounded("exp", min(max(x, -800.0), 800.0))


def log(x: float) -> float:
    """Return the natural logarithm of x > 0; of 0, -inf."""
    if x < 0:
        raise ValueError(f"BUG: {x!r} has no logarithm")
    return _rounded("log", x) if x else -math.inf


def power(x: float, y: float) -> float:
    """Return x to the y, for x ≥ 0 and a finite y; 0 to the 0 is 1."""
    if x < 0:
        raise ValueError(f"BUG: {x!r} to the {y!r}: the base is negative")
    if y == 0:
        return 1.0
    if x == 0:
        return 0.0 if y > 0 else math.inf
    return _rounded("power", x, y)


@functools.cache
def _arithmetic() -> Any:
    """Return mpmath at our precision, apart from the one that others set; loaded when the first number asks."""
    context = importlib.import_module("mpmath").MPContext()
    context.prec = _BITS
    return context


def _rounded(function: str, *arguments: float) -> float:
    """Apply a function of mpmath and round its value."""
    return float(getattr(_arithmetic(), function)(*arguments))
