"""Presets: the curves and lists that people know by name, each against a formula or table of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from sdmerge_build.weights.presets import ALIASES, PRESETS

POSITIONS = np.arange(25)


def ones(*ranges: tuple[int, int]) -> list[float]:
    """Write a list of 25 positions that is 1 on ranges, both ends included, and 0 elsewhere."""
    return [float(any(low <= n <= high for low, high in ranges)) for n in range(25)]


def smooth(x: float) -> float:
    return x * x * (3 - 2 * x)


def zigzag(t: float) -> float:
    """Return the distance to the nearest even number."""
    return abs(t - 2 * round(t / 2))


def hermite(x: float) -> float:
    return ((77 * x - 115.5) * x + 50) * x / 12 + 1 / 24 if x > 0 else 0.0


def fake_hermite(x: float) -> float:
    return ((38 * x - 57) * x + 25) * x / 6


CURVES: dict[str, Callable[[float], float]] = {
    "GRAD_V": lambda x: max(1 - 2 * x, 2 * x - 1),
    "GRAD_A": lambda x: min(2 * x, 2 - 2 * x),
    "FLAT_25": lambda _: 0.25,
    "FLAT_75": lambda _: 0.75,
    "SMOOTHSTEP": smooth,
    "REVERSE_SMOOTHSTEP": lambda x: smooth(1 - x),
    "2SMOOTHSTEP": lambda x: zigzag(2 * smooth(x)),
    "2R_SMOOTHSTEP": lambda x: 1 - zigzag(2 * smooth(x)),
    "3SMOOTHSTEP": lambda x: zigzag(3 * smooth(x)),
    "3R_SMOOTHSTEP": lambda x: 1 - zigzag(3 * smooth(x)),
    "4SMOOTHSTEP": lambda x: zigzag(4 * smooth(x)),
    "4R_SMOOTHSTEP": lambda x: 1 - zigzag(4 * smooth(x)),
    "HALF_SMOOTHSTEP": lambda x: smooth(zigzag(2 * x)),
    "HALF_R_SMOOTHSTEP": lambda x: smooth(1 - zigzag(2 * x)),
    "ONE_THIRD_SMOOTHSTEP": lambda x: smooth(zigzag(3 * x)),
    "ONE_THIRD_R_SMOOTHSTEP": lambda x: smooth(1 - zigzag(3 * x)),
    "ONE_FOURTH_SMOOTHSTEP": lambda x: smooth(zigzag(4 * x)),
    "ONE_FOURTH_R_SMOOTHSTEP": lambda x: smooth(1 - zigzag(4 * x)),
    "COSINE": lambda x: math.cos(math.pi * x / 2) ** 2,
    "REVERSE_COSINE": lambda x: math.sin(math.pi * x / 2) ** 2,
    "TRUE_CUBIC_HERMITE": hermite,
    "TRUE_REVERSE_CUBIC_HERMITE": lambda x: 1 - hermite(x),
    "FAKE_CUBIC_HERMITE": fake_hermite,
    "FAKE_REVERSE_CUBIC_HERMITE": lambda x: 1 - fake_hermite(x),
    "ALL_A": lambda _: 0.0,
    "ALL_B": lambda _: 1.0,
}
LISTS = {
    "WRAP08": ones((0, 3), (21, 24)),
    "WRAP12": ones((0, 5), (19, 24)),
    "WRAP14": ones((0, 6), (18, 24)),
    "WRAP16": ones((0, 7), (17, 24)),
    "MID12_50": [one / 2 for one in ones((5, 18))],
    "OUT07": ones((18, 24)),
    "OUT12": ones((13, 24)),
    "OUT12_5": [0.5 if n == 12 else one for n, one in enumerate(ones((13, 24)))],
    "RING08_SOFT": [0.5 if n in {5, 9, 15, 19} else one for n, one in enumerate(ones((6, 8), (16, 18)))],
    "RING08_5": ones((6, 9), (15, 18)),
    "RING10_5": ones((5, 9), (15, 19)),
    "RING10_3": ones((6, 10), (14, 18)),
    "LOW_OFFSET_CUBIC_HERMITE": [
        *(0, 0.0995, 0.1629, 0.2123, 0.2492, 0.2750, 0.2910, 0.2987, 0.2994, 0.2945, 0.2855, 0.2736, 0.2615),
        *(0.2494, 0.2457, 0.2376, 0.2229, 0.2243, 0.2346, 0.2477, 0.2732, 0.3120, 0.3609, 0.4226, 0.5),
    ],
}
# As supermerger's and sd-meh's files have them, at positions 1, 5, 9, 13 and 20.
AS_WRITTEN = {
    "GRAD_V": (0.9166666667, 0.5833333333, 0.25, 0.0833333333, 0.6666666667),
    "SMOOTHSTEP": (0.00506365740740741, 0.112123842592593, 0.31640625, 0.562355324074074, 0.925925925925926),
    "2SMOOTHSTEP": (0.0101273148148148, 0.224247685185185, 0.6328125, 0.875289351851852, 0.148148148148148),
    "3SMOOTHSTEP": (0.0151909722222222, 0.336371527777778, 0.94921875, 0.312934027777778, 0.777777777777778),
    "4R_SMOOTHSTEP": (0.97974537037037, 0.55150462962963, 0.265625, 0.750578703703704, 0.703703703703703),
    "HALF_SMOOTHSTEP": (0.0196759259259259, 0.376157407407407, 0.84375, 0.980324074074074, 0.259259259259259),
    "ONE_THIRD_R_SMOOTHSTEP": (0.95703125, 0.31640625, 0.04296875, 0.68359375, 0.5),
    "ONE_FOURTH_SMOOTHSTEP": (0.0740740740740741, 0.925925925925926, 0.5, 0.0740740740740741, 0.740740740740741),
    "COSINE": (0.995722430686905, 0.896676670145617, 0.691341716182545, 0.434736903889974, 0.0669872981077805),
    "TRUE_CUBIC_HERMITE": (0.199031876929012, 0.549991560570988, 0.589029947916667, 0.49438777970679, 0.543209876543211),
    "FAKE_CUBIC_HERMITE": (0.157576195987654, 0.512996720679012, 0.560546875, 0.476152584876543, 0.540123456790124),
}


def values(name: str, count: int = 25) -> list[float]:
    """Sample a preset over so many layers."""
    return [float(PRESETS[name].at(n, count)) for n in range(count)]


def test_every_preset_has_its_oracle_here():
    """
    No preset is without a formula or a list in this file.
    """
    assert {*CURVES, *LISTS} == set(PRESETS)
    assert not CURVES.keys() & LISTS.keys()


@pytest.mark.parametrize("count", [25, 19, 24, 38, 57, 2])
@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_its_formula_at_any_depth(name: str, count: int):
    """
    Curves are sampled at equal distances from the first layer to the last, whatever their number.
    """
    expected = [CURVES[name](n / (count - 1)) for n in range(count)]
    np.testing.assert_allclose(values(name, count), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_its_positions(name: str):
    """
    A list of positions is the list, exactly.
    """
    assert LISTS[name] == values(name)


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_presets_are_those_that_people_have(name: str):
    """
    The closed forms meet the tables that other tools carry.
    """
    at = values(name)
    np.testing.assert_allclose([at[n] for n in (1, 5, 9, 13, 20)], AS_WRITTEN[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["WRAP08", "RING10_3", "LOW_OFFSET_CUBIC_HERMITE"])
@pytest.mark.parametrize("count", [19, 24, 38, 57])
def test_a_list_at_another_depth_takes_the_nearest_position(name: str, count: int):
    """
    Stretched over more or fewer layers, steps stay steps.
    """
    nearest = [int(np.argmin(np.abs(POSITIONS / 24 - n / (count - 1)))) for n in range(count)]
    assert [LISTS[name][n] for n in nearest] == values(name, count)


def test_only_all_b_says_base():
    """
    BASE is 0 in every preset but ALL_B, where it is 1.
    """
    assert {"ALL_B": 1} == {name: preset.base for name, preset in PRESETS.items() if preset.base}


def test_one_layer_has_the_first_value():
    """
    Where there is one layer, it is the first.
    """
    assert [1.0] == values("GRAD_V", 1)
    assert [0.0] == values("SMOOTHSTEP", 1)
    assert [1.0] == values("WRAP08", 1)


def test_the_cosine_is_exact_where_it_is_rational():
    """
    No library's cosine has a say: at a third, a half and two thirds of the way there is no rounding error at all.
    """
    at = values("COSINE")
    assert (1.0, 0.75, 0.5, 0.25, 0.0) == (at[0], at[8], at[12], at[16], at[24])


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_supermergers_spellings_are_the_same_presets(name: str):
    """
    `SMOOTHSTEP*2` has twice the way up and down, `SMOOTHSTEP/2` goes up in half the way; R_ turns them over.
    """
    kind = {"*": "{}{}SMOOTHSTEP", "/": "{}_{}SMOOTHSTEP"}
    sign = next((sign for sign in kind if sign in name), "")
    reverse = "R_" if name.startswith("R_") else ""
    number = {"*": name[-1], "/": {"2": "HALF", "3": "ONE_THIRD", "4": "ONE_FOURTH"}.get(name[-1], ""), "": ""}[sign]
    assert (kind[sign].format(number, reverse) if sign else "REVERSE_SMOOTHSTEP") == ALIASES[name]
    assert name not in PRESETS
