"""Owns shares: what part of each model a linear method takes, found by running the method itself on symbols instead of tensors.

Has never heard of recipes or tensors. A method that does anything but add, subtract and scale has no shares.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import Any

from sdmerge_build.methods import Method

__all__ = ["Blend", "blend_of"]


class Blend:
    """A weighted sum of things, as symbols: `{thing: share}`."""

    def __init__(self, shares: Mapping[Any, float]) -> None:
        self.shares = shares

    def __getitem__(self, thing: Any) -> float:
        return self.shares.get(thing, 0.0)

    def __add__(self, other: Blend) -> Blend:
        if not isinstance(other, Blend):
            return NotImplemented
        return Blend({thing: self[thing] + other[thing] for thing in (*self.shares, *(t for t in other.shares if t not in self.shares))})

    def __sub__(self, other: Blend) -> Blend:
        if not isinstance(other, Blend):
            return NotImplemented
        return self + other * -1.0

    def __mul__(self, factor: float) -> Blend:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return Blend({thing: share * factor for thing, share in self.shares.items()})


def blend_of(method: Method, models: Collection[int], count: int, params: Mapping[str, Any]) -> Blend | None:
    """Return the share each of `count` models has in the method's result, or None when it is not a weighted sum.

    Only the given `models` are shown to the method; None is also the answer when it asks for another.
    """
    symbols = [Blend({n: 1.0}) if n in models else None for n in range(count)]
    try:
        result = method.function(*symbols, **params)
        if isinstance(result, Generator):
            result = _outcome(result)
    except Exception:  # noqa: BLE001  what a method makes of symbols is its own affair
        return None
    return result if isinstance(result, Blend) else None


def _outcome(made: Generator[Any, Any, Any]) -> Any:
    """Return what a measured method makes without having asked anything; None when it asks."""
    try:
        next(made)
    except StopIteration as done:
        return done.value
    return None
