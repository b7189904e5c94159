"""Owns the numbers of a ratio table: read within a range, and complained of in one way.

Has never heard of blocks or tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_ENTRIES", "Range", "RatioError"]

MAX_ENTRIES = 1000


class RatioError(ValueError):
    """A ratio cannot be read; `hint` says what to type instead."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Range:
    """What the numbers of a ratio may be, both ends included."""

    low: float = -math.inf
    high: float = math.inf

    def read(self, value: Any, what: str) -> float:
        """Read a finite number of the range; the two zeros are one. Raises `RatioError`."""
        if isinstance(value, str):
            advice = 'block weights are written `{ mbw = "0.5,0,…" }`' if "," in value else "write the number without quotes"
            raise RatioError(f"has text as {what}: {value[:40]!r}", advice)
        try:
            number = float(value) if type(value) in {int, float} else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            message = f"has {repr(value)[:40]} as {what}, which is not a finite number"
            raise RatioError(message, "values over depth are written `{ base = 0.5, curve = [0.2, 0.8] }`" if isinstance(value, list) else "")
        if not self.low <= number <= self.high:
            message = f"has {number!r} as {what}, which is not {self}"
            raise RatioError(message)
        return number + 0.0

    def parse(self, text: str, what: str, hint: str = "") -> float:
        """Read a number that stands in a text. Raises `RatioError`."""
        try:
            number = float(text)
        except ValueError:
            raise RatioError(f"has {text.strip()[:40]!r} as {what}, which is not a number", hint) from None
        return self.read(number, what)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.low:g} or more"
        return f"{self.high:g} or less" if math.isinf(self.low) else f"from {self.low:g} to {self.high:g}"
