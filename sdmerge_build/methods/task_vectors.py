"""Owns task arithmetic and its kin: differences from a base, thinned out by magnitude or by chance, and added to it.

Has never heard of files. What differs between tools, and often between versions of one, are parameters here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from sdmerge_build.methods import Place, Positive, Ratio, Seed, Unit, method
from sdmerge_build.methods.chance import bernoulli
from sdmerge_build.methods.consensus import Difference, Measured, combined, differences, kept_count, trimmed, without_larger, without_smaller
from sdmerge_build.methods.measures import kth, total

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["breadcrumbs", "dare", "della", "task_arithmetic", "ties"]

_EACH: Any = 1.0  # a number stands for as many as there are models
_GAMMA: Any = 0.01
_EPSILON: Any = 0.15


@method(version=1)
def task_arithmetic(base: Tensor, /, *models: Tensor, weights: list[Ratio] = _EACH) -> Tensor:
    """Add to `base` what each model learned since: `base + weights[0] * (models[0] - base) + weights[1] * (models[1] - base) + …`.

    weights: one per model; a negative one takes away what a model learned.

    Origin: G. Ilharco et al., "Editing Models with Task Arithmetic" (2022).
    Elsewhere: mergekit `task_arithmetic`, whose `normalize` divides the weights by their sum; with one model, "Add difference" and
        `add_difference`.
    """
    result = base
    for model, weight in zip(models, weights, strict=True):
        if weight != 0:
            result = result + (model - base) * weight
    return result


@method(version=1)
def ties(
    base: Tensor,
    /,
    *models: Tensor,
    density: list[Unit],
    weights: list[Ratio] = _EACH,
    vote: Literal["magnitude", "count"] = "magnitude",
    normalize: bool = True,
    scale: Ratio = 1.0,
    place: Place,
) -> Measured:
    """Trim differences, elect signs, merge what agrees: `base + scale * mean of the trimmed models[i] - base that have the elected sign`.

    density: how much of each difference is kept: its largest magnitudes in the tensor, at least one, and all that equal the smallest of these.
    weights: one per model; they weigh the vote and the mean.
    vote: who elects an element's sign: the sum of the weighted differences, or that of their signs. Where they cancel, nothing is added.
    normalize: whether to divide by the weights of those that agree; otherwise they are summed.
    scale: the factor of what is added; the paper's λ.

    Origin: P. Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023).
    Elsewhere: mergekit `ties`, whose `lambda` is `scale`: elects + where the sum is 0, divides by the sum of signed weights, which turns
        a negative weight around, chooses arbitrarily among equal magnitudes, and aborts on a scalar with a density below 1.
        sd-meh `ties_add_difference` and sd-mecha `ties_sum`, `add_difference_ties`: `vote = "count"`, no weights, `scale` for their alpha, and
        a density of `k`, of which they keep one element more, or two; with `vote_sgn`, `vote = "magnitude"`. model-mixer "TIES" elects no signs.
    """
    found = differences(base, models, weights, density)
    if not found or scale == 0 or not place.numel:
        return base
    found = yield from trimmed(found, place.numel)
    return combined(base, found, vote=vote, divisor=0 if normalize else 1, scale=scale)


@method(version=1)
def breadcrumbs(
    base: Tensor,
    /,
    *models: Tensor,
    density: list[Unit],
    gamma: list[Unit] = _GAMMA,
    weights: list[Ratio] = _EACH,
    consensus: Literal["sum", "ties"] = "sum",
    normalize: bool = False,
    scale: Ratio = 1.0,
    place: Place,
) -> Measured:
    """Leave out the largest and the smallest differences: `base + scale * sum of weights[i] * middle magnitudes of (models[i] - base)`.

    density: how much of each difference is kept, at least one element, and all that equal the smallest or the largest of these.
    gamma: how much of each difference is left out at the top; less, where `density` leaves no room.
    weights: one per model.
    consensus: "ties" adds only differences of the sign that their weighted sum has.
    normalize: whether to divide by the sum of the weights; with "ties", of those that agree.
    scale: the factor of what is added.

    Origin: M. Davari and E. Belilovsky, "Model Breadcrumbs" (2023).
    Elsewhere: mergekit `breadcrumbs`, and `breadcrumbs_ties` with `consensus = "ties"`. Its version loses every tensor with fewer elements than
        1 / gamma: nothing is left where there is nothing to leave out at the top.
    """
    found = differences(base, models, weights, density)
    if not found or scale == 0 or not place.numel:
        return base
    ranks = {d.number: _middle(place.numel, d.density, gamma[d.number]) for d in found}
    wanted = [(d, end, rank) for d in found for end, rank in enumerate(ranks[d.number]) if rank != (1, place.numel)[end]]
    limits = {d.number: [0.0, math.inf] for d in found}
    if wanted:
        answers = yield tuple(kth(d.values.abs(), rank) for d, _, rank in wanted)
        for (d, end, _), answer in zip(wanted, answers, strict=True):
            limits[d.number][end] = answer
    found = [d._replace(values=without_larger(without_smaller(d.values, limits[d.number][0]), limits[d.number][1])) for d in found]
    return combined(base, found, vote=_VOTES[consensus], divisor=_divisor(weights, consensus, normalize=normalize), scale=scale)


def _middle(numel: int, density: float, gamma: float) -> tuple[int, int]:
    """Return the ranks of the smallest and of the largest magnitude that are kept."""
    kept = kept_count(density, numel)
    top = min(int(gamma * numel), numel - kept)
    return numel - top - kept + 1, numel - top


@method(version=3)
def dare(
    base: Tensor,
    /,
    *models: Tensor,
    density: list[Unit],
    weights: list[Ratio] = _EACH,
    rescale: Literal["density", "l1", "none"] = "density",
    consensus: Literal["sum", "ties"] = "sum",
    normalize: bool = False,
    scale: Ratio = 1.0,
    seed: Seed = 0,
    place: Place,
) -> Measured:
    """Drop differences at random and rescale the rest: `base + scale * sum of weights[i] * (kept at random of models[i] - base) / density[i]`.

    density: the probability of each element of a difference to be kept.
    weights: one per model.
    rescale: what makes up for the dropped: division by the density, the factor that restores the sum of magnitudes in the tensor, or nothing.
    consensus: "ties" adds only differences of the sign that their weighted sum has.
    normalize: whether to divide by the sum of the weights; with "ties", of those that agree.
    scale: the factor of what is added.
    seed: another one drops others. Each model, tensor and position has its own chance, whatever else is merged.

    Origin: L. Yu et al., "Language Models are Super Mario" (2023).
    Elsewhere: mergekit `dare_linear`, and `dare_ties` with `consensus = "ties"`; both with `rescale = "l1"` and one chance for the whole process,
        which depends on the order of tensors. sd-mecha `ties_sum_with_dropout`: its probability is 1 - density, and all tensors of a shape have
        the same chance. Chattiori "DARE" and model-mixer "DARE" with a density of 0.5: there, `base` is the model A and one model is B.
    """
    found = differences(base, models, weights, density)
    if not found or scale == 0:
        return base
    probabilities = [d.density for d in found]
    dropped = [d._replace(values=_dropped(d, p, seed, place, rescale)) for d, p in zip(found, probabilities, strict=True)]
    dropped = yield from _restored(found, dropped, rescale)
    return combined(base, dropped, vote=_VOTES[consensus], divisor=_divisor(weights, consensus, normalize=normalize), scale=scale)


@method(version=3, cut="filters")
def della(
    base: Tensor,
    /,
    *models: Tensor,
    density: list[Unit],
    epsilon: list[Positive] = _EPSILON,
    weights: list[Ratio] = _EACH,
    rescale: Literal["density", "l1", "none"] = "density",
    consensus: Literal["sum", "ties"] = "ties",
    normalize: bool = True,
    scale: Ratio = 1.0,
    seed: Seed = 0,
    place: Place,
) -> Measured:
    """Drop differences at random, small ones more often, and rescale the rest: `base + scale * mean of those that have the elected sign`.

    density: the probability of a difference of middle rank to be kept.
    epsilon: how much more probable that is for the largest magnitude of a filter, and less for its smallest; between, by rank. Probabilities end
        at 0 and 1. A filter is an entry of the first dimension: all weights of one output. Elements of vectors are alone, and all of middle rank.
    weights: one per model.
    rescale: what makes up for the dropped: division by each element's probability, the factor that restores the sum of magnitudes in the tensor, or
        nothing.
    consensus: "ties" adds only differences of the sign that their weighted sum has.
    normalize: whether to divide by the sum of the weights; with "ties", of those that agree.
    scale: the factor of what is added.
    seed: another one drops others. Each model, tensor and position has its own chance, whatever else is merged.

    Origin: P. T. Deep et al., "DELLA-Merging" (2024).
    Elsewhere: mergekit `della`, and `della_linear` with `consensus = "sum"` and `normalize = false`. It ranks along the second dimension and takes
        a vector for one row; rows of one element divide 0 by 0. sd-mecha `ties_sum_with_dropout` ranks over the whole tensor.
    """
    found = differences(base, models, weights, density)
    if not found or scale == 0:
        return base
    probabilities = [_by_rank(d.values.abs(), d.density, epsilon[d.number]) if d.density < 1 else 1.0 for d in found]
    dropped = [d._replace(values=_dropped(d, p, seed, place, rescale)) for d, p in zip(found, probabilities, strict=True)]
    dropped = yield from _restored(found, dropped, rescale)
    return combined(base, dropped, vote=_VOTES[consensus], divisor=_divisor(weights, consensus, normalize=normalize), scale=scale)


_VOTES = {"sum": "", "ties": "magnitude"}


def _divisor(weights: Sequence[float], consensus: str, *, normalize: bool) -> float:
    """Return what a sum is divided by; 0 when that differs from element to element. Weights that cancel out divide nothing."""
    if not normalize:
        return 1.0
    return 0.0 if consensus == "ties" else math.fsum(weights) or 1.0


def _by_rank(magnitudes: Tensor, density: float, epsilon: float) -> Tensor:
    """Give each element of a row its probability; equal magnitudes are ranked by position."""
    length = magnitudes.shape[1]
    if length < 2:
        return torch.full_like(magnitudes, density, dtype=torch.float64)
    order = magnitudes.argsort(dim=1, stable=True)
    steps = torch.arange(length, dtype=torch.float64).mul_(2 * epsilon / (length - 1)).add_(density - epsilon).clamp_(0, 1)
    return torch.empty_like(order, dtype=torch.float64).scatter_(1, order, steps.expand_as(order))


def _dropped(difference: Difference, probability: float | Tensor, seed: int, place: Place, rescale: str) -> Tensor:
    """Drop elements at random; what is kept is divided by its probability, if that is how to rescale."""
    values = difference.values
    if isinstance(probability, float) and probability >= 1:
        return values
    flat = probability.reshape(-1) if isinstance(probability, torch.Tensor) else probability
    kept = values * bernoulli(flat, seed, place, difference.number).to(values.dtype).view_as(values)
    if rescale == "density":
        kept.div_(probability.to(kept.dtype).clamp_(min=torch.finfo(kept.dtype).tiny) if isinstance(probability, torch.Tensor) else probability)
    return kept


def _restored(found: Sequence[Difference], dropped: Sequence[Difference], rescale: str) -> Any:
    """Give differences the sum of magnitudes that they had before some of their elements were dropped, if that is how to rescale."""
    thinned = [n for n, d in enumerate(found) if d.density < 1] if rescale == "l1" else []
    result = list(dropped)
    if thinned:
        answers = yield tuple(total(d.values.abs()) for n in thinned for d in (found[n], dropped[n]))
        for n, before, after in zip(thinned, answers[::2], answers[1::2], strict=True):
            if after > 0:
                result[n].values.mul_(before / after)
    return result
