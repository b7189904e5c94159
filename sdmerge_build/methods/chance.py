"""Owns randomness: numbers that are functions of a seed, a tensor's name, a stream and a position, and of nothing else.

Has never heard of generators, so the order in which slices are worked on does not exist; two tensors of one shape never share their numbers.

The number at position i is output i of SplitMix64 (G. L. Steele, D. Lea, C. H. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014;
mixing constants: D. Stafford's variant 13), whose state is `key + (i + 1) * γ`: made to be entered anywhere, and it passes BigCrush.
The key is 64 bits of blake3 over seed, name and stream. All keys walk the same circle of 2^64 states; that any two of 10,000 tensors of 10^8 elements
share a stretch of it has a probability below 10^-3, and there they would differ by a random shift.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sdmerge_build.digest import Digest
from sdmerge_build.methods import Place
from sdmerge_build.methods.elementary import cos_pi, log, sqrt

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["bernoulli", "normal", "uniform"]

_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # γ: 2^64 over the golden ratio, as a signed number
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def uniform(seed: int, place: Place, stream: int = 0) -> Tensor:
    """Return a number of [0, 1) per element of the slice: a multiple of 2^-53, as float64.

    Streams of one seed and tensor are independent: give one to each model, or to each use.
    """
    return _uniform(seed, place, f"uniform {stream}")


def normal(seed: int, place: Place, stream: int = 0) -> Tensor:
    """Return a standard normal number per element of the slice, as float64; none is beyond ±8.6.

    G. E. P. Box and M. E. Muller, "A Note on the Generation of Random Normal Deviates" (1958).
    Of each pair only one number is used: a position that shared its pair with the next would depend on where slices end.
    """
    radius = sqrt(log(1 - _uniform(seed, place, f"normal radius {stream}")).mul_(-2))
    return cos_pi(_uniform(seed, place, f"normal angle {stream}").mul_(2)).mul_(radius)


def bernoulli(p: float | Tensor, seed: int, place: Place, stream: int = 0) -> Tensor:
    """Return a mask that is true with probability p, to 2^-32, for all elements or one p for each; never for 0, always for 1.

    Two positions share a word of 64 bits: half the work, and still a function of the position.
    """
    first, last = place.start // 2, (place.start + place.count + 1) // 2
    words = _words(_key(seed, place.name, f"bernoulli {stream}"), first, last - first)
    halves = words.view(torch.int32)[place.start % 2 :][: place.count]
    if isinstance(p, torch.Tensor):
        return (halves.to(torch.float64) + 2**31) * 2.0**-32 < p
    least = math.ceil(p * 2**32) - 2**31
    return halves < least if least < 2**31 else torch.ones_like(halves, dtype=torch.bool)


def _uniform(seed: int, place: Place, purpose: str) -> Tensor:
    """Return multiples of 2^-53 for one purpose."""
    bits = _words(_key(seed, place.name, purpose), place.start, place.count)
    return _shifted(bits, 11).to(torch.float64).mul_(2.0**-53)


def _key(seed: int, name: str, purpose: str) -> int:
    """Return 64 bits, as a signed number, that two different triples share only by accident."""
    digest = Digest()
    for fact, value in (("seed", str(seed)), ("tensor", name), ("purpose", purpose)):
        digest.fact(fact, value)
    return int.from_bytes(bytes.fromhex(digest.hexdigest()[:16]), "little", signed=True)


def _words(key: int, start: int, count: int) -> Tensor:
    """Return the outputs of SplitMix64 after `start` steps from a key; products and sums of int64 keep their low 64 bits."""
    words = torch.arange(start + 1, start + 1 + count, dtype=torch.int64).mul_(_STRIDE).add_(key)
    for shift, factor in _MIX:
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shift to the right without the sign: torch has no unsigned shift on every CPU."""
    return words.bitwise_right_shift(by).bitwise_and_((1 << (64 - by)) - 1)
