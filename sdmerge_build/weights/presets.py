"""Owns presets: the block weights that people know by name, as curves over depth, or as lists of the 25 blocks of SD 1.

Has never heard of architectures or tensors. Values are exact fractions, rounded once by whoever uses them, so that no library of
mathematics decides what a preset is.
"""

from __future__ import annotations

import decimal
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["ALIASES", "POSITIONS", "PRESETS", "Preset"]

POSITIONS = 25
"""The blocks of SD 1 that presets were made for: IN00 to IN11, M00, OUT00 to OUT11."""

Curve = Callable[[Fraction], Fraction]

_HALF = Fraction(1, 2)
_PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
_DIGITS = 50  # far beyond a double's 17, so that rounding once is rounding correctly


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The value of BASE, and a curve over depth from 0 to 1, or a value per position."""

    base: Fraction = Fraction(0)
    curve: Curve | None = None
    positions: tuple[Fraction, ...] = ()

    def at(self, n: int, count: int) -> Fraction:
        """Return the value of the n-th of `count` layers, from 0; a list is asked for the position that is nearest."""
        if self.curve:
            return self.curve(Fraction(n, max(count - 1, 1)))
        return self.positions[(2 * n * (POSITIONS - 1) + count - 1) // (2 * max(count - 1, 1))]


def _flat(value: float) -> Preset:
    return Preset(curve=lambda _: Fraction(value))


def _steps(*runs: tuple[int, float]) -> Preset:
    """List positions by runs of `(length, value)`."""
    return Preset(positions=tuple(itertools.chain.from_iterable((Fraction(value),) * length for length, value in runs)))


def _triangle(t: Fraction) -> Fraction:
    """Go up from 0 to 1 and down again, with period 2."""
    return min(t % 2, 2 - t % 2)


def _smooth(x: Fraction) -> Fraction:
    return 3 * x**2 - 2 * x**3


def _cosine(x: Fraction) -> Fraction:
    """Return (1 + cos πx) / 2, the cosine by its series."""
    with decimal.localcontext(decimal.Context(prec=_DIGITS + 10)):
        square = (_PI * x.numerator / x.denominator) ** 2
        term = total = decimal.Decimal(1)
        for n in itertools.count(1):
            term *= -square / (2 * n * (2 * n - 1))
            total += term
            if abs(term) < decimal.Decimal(10) ** -_DIGITS:
                return (1 + Fraction(round(total, _DIGITS))) / 2
    raise AssertionError("BUG: the series of the cosine ends")


def _true_cubic_hermite(x: Fraction) -> Fraction:
    return Fraction(77, 12) * x**3 - Fraction(77, 8) * x**2 + Fraction(25, 6) * x + Fraction(1, 24) if x else Fraction(0)


def _fake_cubic_hermite(x: Fraction) -> Fraction:
    return Fraction(19, 3) * x**3 - Fraction(19, 2) * x**2 + Fraction(25, 6) * x


def _waves(count: int) -> Curve:
    return lambda x: _triangle(count * _smooth(x))


def _smooth_waves(count: int) -> Curve:
    return lambda x: _smooth(_triangle(count * x))


def _both_ways(name: str, reverse: str, curve: Curve) -> dict[str, Preset]:
    """Name a curve, and what is left of 1 above it."""
    return {name: Preset(curve=curve), reverse: Preset(curve=lambda x: 1 - curve(x))}


_LOW_OFFSET = (
    "0 .0995 .1629 .2123 .2492 .2750 .2910 .2987 .2994 .2945 .2855 .2736 .2615 .2494 .2457 .2376 .2229 .2243 .2346 .2477 .2732 .3120 .3609 .4226 .5"
)

PRESETS: Mapping[str, Preset] = {
    **_both_ways("GRAD_V", "GRAD_A", lambda x: abs(1 - 2 * x)),
    "FLAT_25": _flat(0.25),
    "FLAT_75": _flat(0.75),
    "WRAP08": _steps((4, 1), (17, 0), (4, 1)),
    "WRAP12": _steps((6, 1), (13, 0), (6, 1)),
    "WRAP14": _steps((7, 1), (11, 0), (7, 1)),
    "WRAP16": _steps((8, 1), (9, 0), (8, 1)),
    "MID12_50": _steps((5, 0), (14, 0.5), (6, 0)),
    "OUT07": _steps((18, 0), (7, 1)),
    "OUT12": _steps((13, 0), (12, 1)),
    "OUT12_5": _steps((12, 0), (1, 0.5), (12, 1)),
    "RING08_SOFT": _steps((5, 0), (1, 0.5), (3, 1), (1, 0.5), (5, 0), (1, 0.5), (3, 1), (1, 0.5), (5, 0)),
    "RING08_5": _steps((6, 0), (4, 1), (5, 0), (4, 1), (6, 0)),
    "RING10_5": _steps((5, 0), (5, 1), (5, 0), (5, 1), (5, 0)),
    "RING10_3": _steps((6, 0), (5, 1), (3, 0), (5, 1), (6, 0)),
    **_both_ways("SMOOTHSTEP", "REVERSE_SMOOTHSTEP", _smooth),
    **_both_ways("2SMOOTHSTEP", "2R_SMOOTHSTEP", _waves(2)),
    **_both_ways("3SMOOTHSTEP", "3R_SMOOTHSTEP", _waves(3)),
    **_both_ways("4SMOOTHSTEP", "4R_SMOOTHSTEP", _waves(4)),
    **_both_ways("HALF_SMOOTHSTEP", "HALF_R_SMOOTHSTEP", _smooth_waves(2)),
    **_both_ways("ONE_THIRD_SMOOTHSTEP", "ONE_THIRD_R_SMOOTHSTEP", _smooth_waves(3)),
    **_both_ways("ONE_FOURTH_SMOOTHSTEP", "ONE_FOURTH_R_SMOOTHSTEP", _smooth_waves(4)),
    **_both_ways("COSINE", "REVERSE_COSINE", _cosine),
    **_both_ways("TRUE_CUBIC_HERMITE", "TRUE_REVERSE_CUBIC_HERMITE", _true_cubic_hermite),
    **_both_ways("FAKE_CUBIC_HERMITE", "FAKE_REVERSE_CUBIC_HERMITE", _fake_cubic_hermite),
    "LOW_OFFSET_CUBIC_HERMITE": Preset(positions=tuple(map(Fraction, _LOW_OFFSET.split()))),
    "ALL_A": _flat(0),
    "ALL_B": Preset(base=Fraction(1), curve=lambda _: Fraction(1)),
}
"""The names are sd-meh's."""

ALIASES: Mapping[str, str] = {
    "REVERSE-SMOOTHSTEP": "REVERSE_SMOOTHSTEP",
    "SMOOTHSTEP*2": "2SMOOTHSTEP",
    "SMOOTHSTEP*3": "3SMOOTHSTEP",
    "SMOOTHSTEP*4": "4SMOOTHSTEP",
    "R_SMOOTHSTEP*2": "2R_SMOOTHSTEP",
    "R_SMOOTHSTEP*3": "3R_SMOOTHSTEP",
    "R_SMOOTHSTEP*4": "4R_SMOOTHSTEP",
    "SMOOTHSTEP/2": "HALF_SMOOTHSTEP",
    "SMOOTHSTEP/3": "ONE_THIRD_SMOOTHSTEP",
    "SMOOTHSTEP/4": "ONE_FOURTH_SMOOTHSTEP",
    "R_SMOOTHSTEP/2": "HALF_R_SMOOTHSTEP",
    "R_SMOOTHSTEP/3": "ONE_THIRD_R_SMOOTHSTEP",
    "R_SMOOTHSTEP/4": "ONE_FOURTH_R_SMOOTHSTEP",
}
"""How supermerger writes some of them."""
