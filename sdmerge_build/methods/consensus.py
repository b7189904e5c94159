"""Owns what methods do with the differences of models from a base: thinning them out, electing signs, adding them up.

Has never heard of recipes; the methods are in `task_vectors` and `sparse`. Masks are numbers, 0 and 1, of the tensors' own dtype:
torch is many times faster with them than with truth values.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sdmerge_build.methods.measures import kth

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["Difference", "Measured", "combined", "differences", "elected", "kept_count", "signs_of", "trimmed", "without_larger", "without_smaller"]

Measured = Generator[Any, Any, "Tensor"]
"""What a method is that asks for measures."""


class Difference(NamedTuple):
    """What a model has learned since the base, on a slice."""

    number: int  # of the model in `models`
    values: Tensor  # nobody else's: methods may overwrite them
    weight: float
    density: float


def differences(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float]) -> list[Difference]:
    """Take the differences that count: those with a weight and a density other than 0."""
    wanted = zip(models, weights, densities, strict=True)
    return [Difference(n, model - base, weight, density) for n, (model, weight, density) in enumerate(wanted) if weight != 0 and density != 0]


def kept_count(density: float, numel: int) -> int:
    """Return how many elements a density leaves: rounded down, but at least one."""
    return max(1, int(density * numel))


def trimmed(found: Sequence[Difference], numel: int) -> Generator[Any, Any, list[Difference]]:
    """Leave of each difference its largest magnitudes, as many as its density says, and all that equal the smallest of these."""
    thinned = [d for d in found if kept_count(d.density, numel) < numel]
    thresholds = dict.fromkeys((d.number for d in found), 0.0)
    if thinned:
        answers = yield tuple(kth(d.values.abs(), numel - kept_count(d.density, numel) + 1) for d in thinned)
        thresholds |= {d.number: answer for d, answer in zip(thinned, answers, strict=True)}
    return [d._replace(values=without_smaller(d.values, thresholds[d.number])) for d in found]


def without_smaller(values: Tensor, least: float) -> Tensor:
    """Put 0 where a magnitude is below `least`, which is a number of the tensor's dtype."""
    return torch.nn.functional.hardshrink(values, _below(least, values.dtype)) if least > 0 else values


def without_larger(values: Tensor, most: float) -> Tensor:
    """Put 0 where a magnitude is above `most`; takes the tensor for its own."""
    return values.sub_(torch.nn.functional.hardshrink(values, most)) if most < math.inf else values


def _below(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of a dtype below a positive one."""
    bits = torch.tensor([value], dtype=dtype).view(_whole_numbers(dtype.itemsize))
    return float((bits - 1).view(dtype).item())


def combined(base: Tensor, found: Sequence[Difference], *, vote: str, divisor: float, scale: float) -> Tensor:
    """Add the differences to the base, each times its weight; takes their tensors for its own.

    Where there is a `vote`, only those of the elected sign are added. All are divided by `divisor`; where that is 0, by the sum of the
    weights of those that were added.
    """
    if not vote:
        terms = [d.values.mul_(d.weight * scale / divisor) for d in found]
        for term in terms[1:]:
            terms[0].add_(term)
        return base + terms[0]
    terms = [d.values.mul_(d.weight) if d.weight != 1 else d.values for d in found]
    weights = [abs(d.weight) for d in found]
    agreed, share = elected(terms, weights, signs_of(terms, vote))
    agreed.mul_(scale / divisor) if divisor else agreed.div_(share).mul_(scale)
    return base + agreed


def signs_of(terms: Sequence[Tensor], vote: str) -> Tensor:
    """Elect a sign for each element: of the terms' sum, or of the sum of their signs; 0 where they cancel out."""
    ballots = [term.sign() for term in terms] if vote == "count" else terms
    result = ballots[0].clone()
    for ballot in ballots[1:]:
        result.add_(ballot)
    return result.sign_()


def elected(terms: Sequence[Tensor], weights: Sequence[float], signs: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the terms that have the elected sign, and their weights; takes the terms' tensors for its own. Where none has, the weights are not 0."""
    total, share = torch.zeros_like(signs), torch.zeros_like(signs)
    for term, weight in zip(terms, weights, strict=True):
        agrees = term.sign().eq_(signs)
        total.add_(term.mul_(agrees))
        share.add_(agrees.mul_(weight))
    return total, share.clamp_(min=min(weights))


def _whole_numbers(width: int) -> torch.dtype:
    """Return the whole numbers of as many bytes."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
