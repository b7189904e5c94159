"""Owns merging by frequency: the filters, and the transforms they are applied to.

Has never heard of recipes. Differences are transformed rather than models: what is equal stays so to the last bit, and rounding errors are
in proportion to what changes, within 1e-6 of its length in float32. FFT libraries differ from CPU to CPU, so the methods are `pinned`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["crossed", "crossed_in_order"]


def crossed_in_order(a: Tensor, b: Tensor, order: Tensor, alpha: float, beta: float) -> Tensor:
    """Add to `a` the frequencies of `b - a` from about `alpha` on, their values put in ascending order of a third tensor."""
    bins = a.numel() // 2 + 1
    share = _band(bins, alpha, beta)
    if not a.numel() or not share[-1]:
        return a
    if share[0] == 1:  # the share never falls
        return b
    places = order.reshape(-1).argsort(stable=True)
    change = _difference(a, b).reshape(-1)[places]
    spectrum = torch.fft.rfft(change)
    filtered = torch.fft.irfft(spectrum.mul_(share.to(change.dtype)), change.numel())
    return a + change.scatter_(0, places, filtered).view(a.shape)


def _band(bins: int, alpha: float, beta: float) -> Tensor:
    """Return the share of the second model at each frequency of a vector."""
    frequencies = torch.arange(bins, dtype=torch.float64).div_(bins)
    if beta > 1e-10:
        return frequencies.sub_(alpha).div_(beta).add_(0.5).clamp_(0, 1)
    return frequencies.ge(alpha).to(torch.float64)


def crossed(a: Tensor, b: Tensor, alpha: float, tilt: float) -> Tensor:
    """Add to `a` some frequencies of `b - a` over all dimensions; `tilt` is in 0…4, and neither 1 nor 3."""
    if not a.numel():
        return a
    change = _difference(a, b)
    spectrum = torch.fft.rfftn(change)
    del change
    share = _steepness(_frequencies(a.shape).to(spectrum.real.dtype), alpha, tilt)
    filtered: Tensor = torch.fft.irfftn(spectrum.mul_(share), s=a.shape)
    return a + filtered


def _difference(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)  # there is no FFT of less
    return b.to(wide) - a.to(wide)


def _frequencies(shape: torch.Size) -> Tensor:
    """Return the frequency of each entry of a real spectrum: the root of the mean of the squares over dimensions, each of which reaches 1."""
    squares: Tensor = torch.zeros(())
    for n, length in enumerate(shape):
        highest = max(length // 2, 1)
        steps = torch.arange(length, dtype=torch.float64)
        steps = steps[: length // 2 + 1] if n == len(shape) - 1 else torch.minimum(steps, length - steps)  # negative ones in the second half
        squares = squares.unsqueeze(-1) + steps.div_(highest).square_()
    return squares.div_(len(shape)).sqrt_()


def _steepness(frequency: Tensor, alpha: float, tilt: float) -> Tensor:
    """Return the share of the second model at each frequency; takes the tensor for its own."""
    if tilt > 2:
        return _steepness(frequency, 1 - alpha, tilt - 2).neg_().add_(1)
    if tilt < 1e-10:
        return frequency.gt(1 - alpha).to(frequency.dtype)
    if abs(tilt - 2) < 1e-10:
        return frequency.lt(alpha).to(frequency.dtype)
    slope = 1 / math.tan(math.pi * tilt / 2)
    constant = slope * alpha + alpha - slope if tilt < 1 else alpha - slope * alpha
    return frequency.mul_(slope).add_(constant).clamp_(0, 1)
