"""Functions of tensors and of single numbers that no C library and no CPU decides, and chance that depends on positions alone."""

from __future__ import annotations

import hashlib
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdmerge_build.methods import Place, chance, elementary, scalars

ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONVOLUTION = "model.diffusion_model.output_blocks.11.0.out_layers.3.weight"
WIDE = 1 << 18
TRUE = mpmath.MPContext()
TRUE.prec = 200


def place(name: str = ATTENTION, start: int = 0, count: int = WIDE) -> Place:
    """A slice of a large tensor."""
    return Place(name=name, shape=(1 << 16, 1 << 16), start=start, count=count, architecture="sd1")


def wide(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def ulps(x: list[float], found: torch.Tensor, true: Callable) -> float:
    """The largest distance from the true value, in units of its last place."""
    worst = 0.0
    for argument, value in zip(x, found.tolist(), strict=True):
        exact = true(TRUE.mpf(argument))
        unit = TRUE.ldexp(1, max(TRUE.frexp(exact)[1] - 53, -1074))
        worst = max(worst, float(abs(exact - value) / unit))
    return worst


def near(dice: random.Random, centres: list[float], count: int) -> list[float]:
    """Numbers close to centres, at every distance down to the last bit."""
    return [dice.choice(centres) + dice.uniform(-1, 1) * 2.0 ** -dice.randint(2, 60) for _ in range(count)]


def test_logarithms_are_true_to_the_last_place():
    """A logarithm is within 1 ulp, of subnormal, tiny, ordinary and huge numbers, and next to 1."""
    dice = random.Random(1)
    x = [math.ldexp(dice.uniform(0.5, 1), dice.randint(-1073, 1024)) for _ in range(1500)]
    x += [dice.uniform(0.3, 3) for _ in range(1500)] + near(dice, [1.0, 2**0.5, 2**-0.5], 1500)
    x += [5e-324, sys.float_info.min, sys.float_info.max, 1.0, math.nextafter(1, 0), math.nextafter(1, 2)]

    assert ulps(x, elementary.log(wide(x)), TRUE.log) < 1


def test_exponentials_are_true_to_the_last_place():
    """An exponential is within 1 ulp, between powers of two and where results become subnormal or too large."""
    dice = random.Random(2)
    x = [dice.uniform(-745, 709.7) for _ in range(1500)] + near(dice, [0.0, 709.0, -708.0, -745.0], 1500)
    x += [(dice.randint(-1020, 1020) + 0.5) * math.log(2) + dice.uniform(-1e-9, 1e-9) for _ in range(1500)]

    assert ulps(x, elementary.exp(wide(x)), TRUE.exp) < 1


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_sines_are_true_to_the_last_places(name):
    """A sine or cosine is within 4 ulp of its own size, however close to 0 it comes and however many turns it is away."""
    dice = random.Random(3)
    x = [dice.uniform(-1, 1) for _ in range(1000)] + near(dice, [0, 0.25, 0.5, 0.75, 1, 1.5, -0.5, -1], 1500)
    x += [dice.uniform(0, 2) + 2.0 ** dice.randint(1, 51) for _ in range(500)] + [2.0 ** -dice.uniform(1, 1000) for _ in range(100)]
    found = getattr(elementary, f"{name}_pi")(wide(x))

    assert ulps(x, found, getattr(TRUE, f"{name}pi")) < 4
    assert found.abs().max() <= 1


@pytest.mark.parametrize("y", [0.1, 1 / 3, -0.7, 2.0, 17.3, -1000.25, 1e5, -1e12])
def test_powers_are_true_as_far_as_they_reach(y):
    """A power has a relative error below 1e-13, up to the ends of the range."""
    dice = random.Random(y)
    x = [float(TRUE.exp(dice.uniform(-700, 700) / max(abs(y), 1))) for _ in range(700)]
    exact = [TRUE.power(TRUE.mpf(number), TRUE.mpf(y)) for number in x]
    errors = [float(abs(value / true - 1)) for value, true in zip(elementary.power(wide(x), y).tolist(), exact, strict=True)]

    assert max(errors) < 1e-13


def test_square_roots_are_rounded_correctly(monkeypatch):
    """A square root is the nearest float, next to the middle of two as well, even if the one that torch starts from is far off."""
    dice = random.Random(4)
    roots = [Fraction(math.ldexp(dice.uniform(0.5, 1), dice.randint(-530, 500))) for _ in range(3000)]
    middles = [float((root + Fraction(math.ulp(float(root))) / 2) ** 2) for root in roots]
    x = [math.ldexp(dice.uniform(0.5, 1), dice.randint(-1073, 1024)) for _ in range(3000)] + middles
    x += [math.nextafter(square, limit) for square in middles for limit in (0, math.inf)] + [2.0, 4.0, math.nextafter(4, 0), math.nextafter(1, 2)]
    expected = [math.sqrt(number) for number in x]
    torch_root = torch.Tensor.sqrt

    assert elementary.sqrt(wide(x)).tolist() == expected
    noise = 1 + (chance.uniform(1, place(count=len(x))) - 0.5) * 2.0**-38
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda tensor: torch_root(tensor) * noise)
    assert elementary.sqrt(wide(x)).tolist() == expected


def test_powers_of_subnormal_numbers_are_true():
    """The reciprocal of the square root of a subnormal number is as good as any."""
    x = [5e-324, 1e-310, sys.float_info.min]

    assert elementary.power(wide(x), -0.5).tolist() == pytest.approx([1 / math.sqrt(number) for number in x], rel=1e-15)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (elementary.log, [0.0, -0.0, math.inf, -1.0, math.nan, -math.inf, 1.0], [-math.inf, -math.inf, math.inf, math.nan, math.nan, math.nan, 0]),
        (elementary.exp, [math.inf, -math.inf, math.nan, 0.0, 710, -746, 1e308, -1e308], [math.inf, 0, math.nan, 1, math.inf, 0, math.inf, 0]),
        (elementary.cos_pi, [0.0, 0.5, 1, -1.5, 2, 1e300, 2.0**52 + 1, 1e-300], [1, 0, -1, 0, 1, 1, -1, 1]),
        (elementary.sin_pi, [0.0, 0.5, 1, -0.5, 1.5, 1e300, 2.0**51 + 0.5], [0, 1, 0, -1, -1, 0, 1]),
        (elementary.cos_pi, [math.inf, -math.inf, math.nan], [math.nan, math.nan, math.nan]),
        (elementary.sqrt, [0.0, 4.0, math.inf, -1.0, math.nan, 5e-324], [0, 2, math.inf, math.nan, math.nan, math.sqrt(5e-324)]),
        (lambda x: elementary.power(x, 0), [0.0, 3.0, math.inf, math.nan], [1, 1, 1, 1]),
        (lambda x: elementary.power(x, 1), [0.0, 3.0, 5e-324, 1e308], [0, 3, 5e-324, 1e308]),
        (lambda x: elementary.power(x, 0.5), [0.0, 2.0, 5e-324, math.inf], [0, math.sqrt(2), math.sqrt(5e-324), math.inf]),
        (lambda x: elementary.power(x, 0.3), [0.0, 1.0, math.inf, -1.0, math.nan], [0, 1, math.inf, math.nan, math.nan]),
        (lambda x: elementary.power(x, -2.5), [0.0, 1.0, math.inf, -1.0], [math.inf, 1, 0, math.nan]),
        (lambda x: elementary.power(x, 1e308), [0.5, 1.0, 2.0, math.nextafter(1, 0)], [0, 1, math.inf, 0]),
        (lambda x: elementary.power(x, -300.0), [1e-300, 1e300, 1.0], [math.inf, 0, 1]),
    ],
)
def test_edges_are_what_mathematics_says(function, x, expected):
    """Zeros, infinities, negative numbers and exact points give exact results, alone and among others."""
    alone = [function(wide([number])).item() for number in x]

    torch.testing.assert_close(function(wide(x)), wide(expected), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide(alone), wide(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [elementary.log, elementary.exp, elementary.sqrt, elementary.cos_pi, lambda x: elementary.power(x, 0.3)])
def test_there_is_one_nan(function):
    """A nan has the same bits whatever made it: CPUs disagree on the sign of theirs."""
    x = wide([math.nan, -math.nan, 1.0, math.inf, -math.inf, -1.0])
    found = function(x)

    assert set(found[found.isnan()].view(torch.int64).tolist()) == {0x7FF8 << 48}


def test_the_polynomials_are_those_of_their_description():
    """Every coefficient can be derived again from its docstring."""

    def fitted(function: Callable, most, terms: int) -> tuple[float, ...]:
        return tuple(float(c) for c in reversed(context.chebyfit(lambda z: function(context.sqrt(z)), [0, most], terms)))

    context = mpmath.MPContext()
    context.prec = 300

    assert fitted(lambda s: (context.log((1 + s) / (1 - s)) / s - 2) / s**2, (3 - 2 * context.sqrt(2)) ** 2, 7) == elementary._LOG
    assert fitted(lambda r: (r * context.coth(r / 2) - 2) / r**2, context.mpf("0.1202"), 5) == elementary._EXP
    assert fitted(lambda u: (context.sin(context.pi * u) / u - context.pi) / u**2, context.mpf(1) / 4, 8) == elementary._SIN


FUNCTIONS = [
    elementary.log,
    elementary.exp,
    elementary.sqrt,
    elementary.cos_pi,
    elementary.sin_pi,
    *(lambda x, y=y: elementary.power(x, y) for y in (0, 1, 2.5)),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arguments_are_widened_and_never_changed(function, dtype):
    """A function gives float64 of the same shape, what it gives for the widened argument, and leaves the argument alone."""
    x = (chance.uniform(3, place(count=60)) * 50 + 1e-3).to(dtype).view(3, 4, 5)
    before = x.clone()
    found = function(x)

    assert torch.equal(x, before)
    assert found.dtype is torch.float64
    assert torch.equal(found, function(x.double()))
    found.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 1), (2, 0, 3), (4, 3, 3, 3)])
def test_shapes_are_kept(function, shape):
    """A function takes any shape, also one without elements, and a view that is not contiguous."""
    x = chance.uniform(4, place(count=math.prod(shape))).view(shape)

    assert function(x).shape == shape
    assert torch.equal(function(x.mT) if x.ndim > 1 else function(x), function(x).mT if x.ndim > 1 else function(x))


@given(cuts=st.lists(st.integers(0, 400), max_size=6), edges=st.booleans())
def test_slices_change_nothing(cuts, edges):
    """What a function gives for an element does not depend on its neighbours, even if they need another path."""
    x = chance.uniform(5, place(count=400)) * 4
    if edges:
        x[::37] = wide([0.0, -1, math.inf, math.nan, 5e-324, 1e-310, 800, 1e308, -800, 745, 1])
    for function in FUNCTIONS:
        parts = [function(x[a:b]) for a, b in pairwise([0, *sorted(cuts), 400])]
        assert torch.equal(torch.cat(parts).view(torch.int64), function(x).view(torch.int64))


def fingerprint() -> str:
    """One digest of the bits of everything here, over ordinary and odd arguments."""
    x = chance.uniform(6, place(count=40_000)) * 3
    odd = wide([0.0, -1, math.inf, math.nan, 5e-324, 1e-310, 800, 1e308, -800, 745, 1] * 5)
    found = [function(t) for function in FUNCTIONS for t in (x, odd, x * 200 - 300)]
    found += [chance.normal(7, place(CONVOLUTION, count=40_000)), chance.bernoulli(0.3, 8, place()).double()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest()


BITS = "5383c8740ddb29d68754d35e4ba35cc701e8e7d6d351d66aad0b5c8d541621ec"


def test_every_cpu_computes_the_same_bits():
    """The narrowest and the wide vectors, one thread and several, give the bits that every machine gave before."""
    command = [sys.executable, "-c", "import test_elementary as t; print(t.fingerprint())"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    running = [
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability, threads in (("default", "1"), ("avx2", "2"))
    ]

    assert [fingerprint(), *(process.communicate()[0].strip() for process in running)] == [BITS] * 3


def test_random_words_are_those_of_splitmix64():
    """The words of a key are the published outputs of SplitMix64, in the middle of its sequence too."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]

    assert [word % (1 << 64) for word in chance._words(1234567, 0, 5).tolist()] == published
    assert [word % (1 << 64) for word in chance._words(1234567, 3, 2).tolist()] == published[3:]


def test_random_words_wrap_like_unsigned_numbers():
    """Far into a huge tensor, the words are those that whole numbers modulo 2^64 give."""

    def word(key: int, position: int) -> int:
        state = (key + (position + 1) * 0x9E3779B97F4A7C15) % (1 << 64)
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % (1 << 64)
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) % (1 << 64)
        return state ^ state >> 31

    start, key = (1 << 40) - 50, -1234567890123456789

    assert [w % (1 << 64) for w in chance._words(key, start, 100).tolist()] == [word(key, start + n) for n in range(100)]


@given(cuts=st.lists(st.integers(0, 300), max_size=5))
def test_chance_knows_positions_not_slices(cuts):
    """A tensor cut anywhere gets the numbers of the whole one."""
    for draw in (chance.uniform, chance.normal, lambda seed, where: chance.bernoulli(0.4, seed, where)):
        parts = [draw(9, place(start=a, count=b - a)) for a, b in pairwise([0, *sorted(cuts), 300])]
        assert torch.equal(torch.cat(parts), draw(9, place(count=300)))


def test_seeds_names_streams_and_uses_are_independent():
    """Another seed, tensor, stream or use gives numbers that have nothing to do with each other."""
    drawn = [chance.uniform(seed, place(name), stream) for seed in (0, 1) for name in (ATTENTION, CONVOLUTION) for stream in (0, 1)]
    drawn += [
        chance.uniform(0, place(ATTENTION + "0")),
        chance.uniform(10, place()),
        chance.uniform(0, place(), 10),
        chance.uniform(2**63 - 1, place()),
    ]
    drawn += [chance.normal(0, place()), chance.bernoulli(0.5, 0, place()).double()]
    correlations = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)

    assert correlations.abs().max() < 5 / math.sqrt(WIDE)


def test_uniform_numbers_are_uniform():
    """Mean, variance, every bit, every 1024th of the range and neighbours near and far are as chance would have them."""
    u = chance.uniform(11, place(count=1 << 20))
    n = u.numel()
    bits = (u * 2.0**53).to(torch.int64)
    ones = torch.stack([(bits >> k & 1).sum() for k in range(53)]).double()
    cells = torch.histc(u, 1024, 0, 1)
    squares = ((cells - n / 1024) ** 2 / (n / 1024)).sum().item()
    serial = [((u[lag:] - 0.5) * (u[:-lag] - 0.5)).mean().item() * 12 * math.sqrt(n) for lag in (1, 2, 3, 64, 320, 4096, 1 << 17)]

    assert 0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert ((ones - n / 2).abs() < 4.5 * math.sqrt(n) / 2).all()
    assert abs(squares - 1023) < 4 * math.sqrt(2 * 1023)
    assert max(map(abs, serial)) < 4


def test_normal_numbers_are_normal():
    """Moments, the whole distribution, the tails and neighbours are those of the standard normal law."""
    z = chance.normal(12, place(CONVOLUTION, count=1 << 20))
    n = z.numel()
    ordered = z.sort().values
    gap = (torch.special.ndtr(ordered) - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max().item()
    beyond = {k: ((z.abs() > k).sum().item(), n * math.erfc(k / math.sqrt(2))) for k in (1, 2, 3, 4)}

    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert gap < 1.95 / math.sqrt(n)  # Kolmogorov–Smirnov at one in a thousand
    assert all(abs(seen - due) < 4 * math.sqrt(due) for seen, due in beyond.values())
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(n)
    assert 4.5 < z.abs().max() < 8.6


def test_masks_keep_their_share():
    """A mask is true as often as it should be, with one probability for all or one for each; 0 is never and 1 is always."""
    p = torch.linspace(0, 1, WIDE, dtype=torch.float64)
    each = chance.bernoulli(p, 13, place())

    assert not chance.bernoulli(0.0, 13, place()).any()
    assert chance.bernoulli(1.0, 13, place()).all()
    assert abs(chance.bernoulli(0.1, 13, place()).double().mean() - 0.1) < 4 * math.sqrt(0.09 / WIDE)
    assert all(abs(part.double().mean() - (k + 0.5) / 16) < 5 * math.sqrt(0.25 / WIDE * 16) for k, part in enumerate(each.chunk(16)))


@given(x=st.floats(-700, 700), y=st.floats(-20, 20))
def test_scalars_are_rounded_correctly(x, y):
    """exp, log and power of single numbers are the floats next to what `decimal` finds with 60 digits."""
    context = Context(prec=60)
    base = abs(x) + 0.5

    assert scalars.exp(x) == float(context.exp(Decimal(x)))
    assert scalars.log(base) == float(context.ln(Decimal(base)))
    assert scalars.power(base, y) == float(context.power(Decimal(base), Decimal(y)))


@given(x=st.floats(-1e300, 1e300), c=st.floats(-1, 1))
def test_scalar_angles_agree_with_the_c_library(x, c):
    """sin, cos and acos of single numbers are those of the C library but for its last bit."""
    for function, argument in (("sin", x), ("cos", x), ("acos", c)):
        usual = getattr(math, function)(argument)
        assert abs(getattr(scalars, function)(argument) - usual) <= math.ulp(usual)


def test_scalars_have_known_values_and_edges():
    """Famous values and the ends of the range come out, and nobody's precision is touched."""
    before = mpmath.mp.prec

    assert scalars.sin(1e22) == -0.8522008497671888
    assert scalars.cos(math.pi / 2) == 6.123233995736766e-17
    assert [scalars.acos(x) for x in (-1.0, 0.0, 1.0)] == [math.pi, math.pi / 2, 0.0]
    assert [scalars.exp(x) for x in (0.0, 1.0, 1e9, -1e9, -745.0)] == [1.0, math.e, math.inf, 0.0, 5e-324]
    assert [scalars.log(x) for x in (0.0, 1.0, math.inf)] == [-math.inf, 0.0, math.inf]
    assert [scalars.power(0.0, y) for y in (0.0, 0.5, -0.5)] == [1.0, 0.0, math.inf]
    assert [scalars.power(2.0, y) for y in (0.5, -1074.0, 2000.0)] == [math.sqrt(2), 5e-324, math.inf]
    assert math.isnan(scalars.sin(math.inf))
    assert math.isnan(scalars.exp(math.nan))
    assert mpmath.mp.prec == before


@pytest.mark.parametrize(("function", "arguments"), [(scalars.log, (-1.0,)), (scalars.power, (-2.0, 0.5)), (scalars.acos, (1.0000001,))])
def test_scalars_refuse_what_has_no_value(function, arguments):
    """A logarithm or power of a negative number, and an angle with a cosine beyond 1, are mistakes of the caller."""
    with pytest.raises(ValueError, match="BUG"):
        function(*arguments)
