"""Owns log, exp, power, square root, sin and cos of whole tensors, the same bits on every CPU, for any number of threads and any slices.

Has never heard of models; torch's own functions differ in the last bit from one CPU to the next.
Everything here is made of operations that IEEE 754 or integer arithmetic decides: + - × ÷ rounding, comparisons and bits, each a separate pass over
the slice, so that nothing fuses two of them. float32 and narrower widen to float64 exactly; results are float64; arguments are never changed.

Formulas: W. J. Cody and W. Waite, "Software Manual for the Elementary Functions" (1980), for the reduction of arguments, and the comments of fdlibm's
`e_log.c` and `e_exp.c` for the series in f / (2 + f) and for `r / (R - r)`. The polynomials are our own: `mpmath.chebyfit` at 300 bits, rounded once.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["cos_pi", "exp", "log", "power", "sin_pi", "sqrt"]

_LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # 32 bits, so that its product with any exponent is exact
_LN2_LOW = 1.9082149292705877e-10
_LOG2_E = 1.4426950408889634
_PI_LOW = 1.2246467991473532e-16

_ROOT_HALF = 0x3FE6A09E667F3BCD  # bits of the smallest float64 above √½
_ONE = 1023 << 52  # bits of 1.0; a power of two is `(k << 52) + _ONE`
_EXPONENT = 0x7FF << 52
_HEAD = -1 << 27  # keeps 26 of 53 bits: the product of two such heads is exact
_ROUNDER = 3 * 2.0**51  # adding it rounds to a whole number, which then is the low bits

_LOG = (
    0.666666666666667,
    0.39999999999899505,
    0.28571428625975487,
    0.2222221113479508,
    0.18182889125261723,
    0.15331721600556042,
    0.14616449685043406,
)
"""(log((1 + s) / (1 - s)) / s - 2) / s² as a polynomial of s² in 0…(3 - 2√2)²."""

_EXP = (0.1666666666666666, -0.0027777777777563957, 6.613756471400626e-05, -1.653405968872539e-06, 4.143749871385379e-08)
"""(r · coth(r / 2) - 2) / r² as a polynomial of r² in 0…0.1202."""

_SIN = (
    *(-5.16771278004997, 2.55016403987734, -0.599264529320343, 0.08214588659675232),
    *(-0.007370430719634586, 0.00046630087411496363, -2.1906201655131958e-05, 7.725743030789876e-07),
)
"""(sin(πu) / u - π) / u² as a polynomial of u² in 0…¼."""


def log(x: Tensor) -> Tensor:
    """Return the natural logarithm; 0 gives -inf, a negative number nan.

    Within 1 ulp of the true value (0.91 measured).
    """
    k, f = _taken_apart(x)
    k_high, correction = _log_terms(k, f)
    return _with_edges(x, k_high.sub_(correction.sub_(f)), zero=-math.inf, infinity=math.inf)


def exp(x: Tensor) -> Tensor:
    """Return e to the x; beyond the range of float64 inf, or 0 after the subnormal numbers.

    Within 1 ulp of the true value (0.89 measured).
    """
    return _exp(x.to(torch.float64), None)


def power(x: Tensor, y: float) -> Tensor:
    """Return x to the y, for x ≥ 0 and a finite y; 0 to the 0 is 1, a negative x gives nan.

    Exact for y = 0 and 1, correctly rounded for ½; elsewhere the relative error of normal results is below 1e-13 (2.2e-14 measured).
    """
    if y == 0:
        return torch.ones_like(x, dtype=torch.float64)
    if y == 1:
        return x.to(torch.float64, copy=True)
    if y == 0.5:
        return sqrt(x)
    k, f = _taken_apart(x)
    k_high, correction = _log_terms(k, f)
    logarithm = k_high - (correction - f)
    # y · log(x) in two parts, the first one exact: an error of ½ ulp in a product of 700 would be one of 5e-14 in the result
    head = logarithm.view(torch.int64).bitwise_and(_HEAD).view(torch.float64)
    tail = k_high.sub_(head).add_(f).sub_(correction).mul_(y)
    y_head = _from_bits(_bits(y) & _HEAD)
    tail.add_(head * (y - y_head))
    found = _exp(head.mul_(y_head), tail)
    return _with_edges(x, found, zero=0.0 if y > 0 else math.inf, infinity=math.inf if y > 0 else 0.0)


def sqrt(x: Tensor) -> Tensor:
    """Return the square root, correctly rounded as IEEE 754 has it; a negative number gives nan.

    `torch.sqrt` asks MKL where there is one, and MKL's last bit may be wrong: that of √2 is.
    At times it is wrong by thousands of ulp (https://github.com/pytorch/pytorch/issues/188792).
    """
    x = x.to(torch.float64)
    if _lies_within(x, 2.0**-900, 2.0**900):
        return _root(x)
    scale = torch.ones_like(x).masked_fill_(x < 2.0**-900, 2.0**300).masked_fill_(x > 2.0**900, 2.0**-300)
    inside = (x * scale * scale).masked_fill_((x <= 0) | ~x.isfinite(), 1)
    return _with_edges(x, _root(inside) / scale, zero=0.0, infinity=math.inf)


def cos_pi(x: Tensor) -> Tensor:
    """Return cos(π · x), exactly ±1 and 0 where it should be, never beyond ±1; an infinite x gives nan.

    Within 4 ulp of the true value (2.8 measured).
    """
    return _sin_of_half_turn(_turned(x).abs_().neg_().add_(0.5))  # ½ - |r| rounds where the sine is flat


def sin_pi(x: Tensor) -> Tensor:
    """Return sin(π · x), exactly ±1 and 0 where it should be, never beyond ±1; an infinite x gives nan.

    Within 4 ulp of the true value (2.8 measured).
    """
    r = _turned(x)
    folded = r.abs()
    folded = torch.minimum(folded, 1 - folded)
    return _sin_of_half_turn(folded.copysign_(r))


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _from_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _lies_within(x: Tensor, least: float, most: float) -> bool:
    """Tell whether the slow path can be spared; both paths give the same bits, so slices may differ in it."""
    if not x.numel():
        return True
    return x.amin().item() >= least and x.amax().item() <= most  # false for nan


def _polynomial(z: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluate a polynomial, constant first, by Horner's rule."""
    value = z * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value.add_(coefficient).mul_(z)
    return value.add_(coefficients[0])


def _taken_apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and f with x = 2ᵏ · (1 + f), √½ ≤ 1 + f < √2; what is not positive and finite gives numbers without meaning."""
    x = x.to(torch.float64)
    least = sys.float_info.min
    small = None if _lies_within(x, least, math.inf) else x < least
    if small is not None:
        x = torch.where(small, x * 2.0**54, x)  # subnormal numbers have their exponent in the mantissa
    bits = x.view(torch.int64)
    exponent = bits.sub(_ROOT_HALF).bitwise_right_shift_(52)
    k = exponent.to(torch.float64)
    f = bits.sub(exponent.bitwise_left_shift_(52)).view(torch.float64).sub_(1)
    if small is not None:
        k = torch.where(small, k - 54, k)
    return k, f


def _log_terms(k: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and c with log(2ᵏ · (1 + f)) = a - (c - f): a is exact and takes the place of k, c is small beside f or a."""
    s = f / (f + 2)
    z = s * s
    correction = _polynomial(z, _LOG).mul_(z)
    correction = torch.sub(f, correction, out=correction).mul_(s).sub_(k * _LN2_LOW)
    return k.mul_(_LN2_HIGH), correction


def _with_edges(x: Tensor, found: Tensor, *, zero: float, infinity: float) -> Tensor:
    """Put in what a function is at 0 and infinity; it is nan below 0."""
    if _lies_within(x, math.ulp(0.0), sys.float_info.max):
        return found
    found = torch.where(x > 0, found, math.nan)
    return found.masked_fill_(x == 0, zero).masked_fill_(x == math.inf, infinity)


def _root(x: Tensor) -> Tensor:
    """Return the square root of numbers so far from 0 and infinity that the square's last bits exist."""
    root = x.sqrt()
    while True:
        head = root.view(torch.int64).add(1 << 26).bitwise_and_(_HEAD).view(torch.float64)  # rounded: both parts have 26 bits
        tail = root - head
        square = root * root
        excess = (head * head).sub_(square).add_(head.mul_(tail).mul_(2)).add_(tail.mul_(tail))  # of the true square; exact (T. J. Dekker, 1971)
        rest = torch.sub(x, square, out=square).sub_(excess)
        unit = root.view(torch.int64).sub(1).bitwise_and_(_EXPONENT).view(torch.float64).mul_(2.0**-52)  # to the number below
        limit = root * unit  # (root ± ½ unit)² is `limit` away, less than what `rest` is counted in
        if not x.numel() or (rest.abs() - limit * 2).amax().item() <= 0:
            break
        root.add_(rest.div_(root).mul_(0.5))  # more than 1 ulp away: a step of Newton's
    root.add_((rest > limit).to(torch.float64).mul_(unit))
    return root.sub_((rest <= limit.neg_()).to(torch.float64).mul_(unit))


def _exp(x: Tensor, tail: Tensor | None) -> Tensor:
    """Return e to the x + tail, where the tail is tiny beside x."""
    plain = _lies_within(x, -708.0, 709.0)
    if not plain:
        x = x.clamp(-800, 800)  # beyond, nothing changes any more
        tail = None if tail is None else tail.clamp_(-1, 1)
    k = (x * _LOG2_E).add_(_ROUNDER)
    shift = k.view(torch.int64).bitwise_left_shift(52)
    k.sub_(_ROUNDER)
    low = k * _LN2_LOW
    if tail is not None:
        low.sub_(tail)
    high = x - k.mul_(_LN2_HIGH)
    r = high - low
    z = r * r
    c = _polynomial(z, _EXP).mul_(z)
    c = torch.sub(r, c, out=c)
    value = r.mul_(c).div_(c.neg_().add_(2)).sub_(low).add_(high).add_(1)  # 1 + 2r / (R - r), the small parts first
    if plain:
        value.view(torch.int64).add_(shift)
        return value
    exponent = shift.bitwise_right_shift_(52)
    half = exponent.bitwise_right_shift(1)
    for step in (half, exponent - half):  # 2ᵏ itself may be out of range; only the last product rounds
        value.mul_(step.add_(1023).bitwise_left_shift_(52).view(torch.float64))
    return value.masked_fill_(x.isnan(), math.nan)  # one nan, not each CPU's own


def _turned(x: Tensor) -> Tensor:
    """Return x less the nearest even number, exactly: -1…1."""
    x = x.to(torch.float64)
    return x - (x * 0.5).round_().mul_(2)


def _sin_of_half_turn(u: Tensor) -> Tensor:
    """Return sin(π · u) for |u| ≤ ½; takes the tensor for its own."""
    z = u * u
    value = _polynomial(z, _SIN).mul_(z).add_(_PI_LOW).mul_(u)
    value = u.mul_(math.pi).add_(value).clamp_(-1, 1)
    return value if _lies_within(value, -1, 1) else value.masked_fill_(value.isnan(), math.nan)
