"""Owns the methods that decide element by element what to take over from other models.

Has never heard of files. What is decided by rank or by proportion asks the whole tensor; nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdmerge_build.methods import Place, Positive, Ratio, Unit, method
from sdmerge_build.methods.consensus import Measured, elected, kept_count, signs_of, without_smaller
from sdmerge_build.methods.elementary import exp, log
from sdmerge_build.methods.measures import count, dot, kth, row_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["arcee_fusion", "nearswap", "ram", "sce"]


@method(version=3)
def sce(base: Tensor, /, *models: Tensor, density: Unit = 1.0, place: Place) -> Measured:
    """Take what models disagree on most, each by its energy: `base + sum of q[i] * d[i] / sum of q[i], over d[i] with the elected sign`.

    d[i] is models[i] - base where the variance over all models is among the largest, elsewhere 0; q[i] is the sum of its squares; a sign is
    elected by the sum of d. Where models do not vary, a density below 1 takes nothing.

    density: how many of the elements that vary are taken: at least one, and all that vary as much as the last of these.

    Origin: F. Wan et al., "FuseChat: Knowledge Fusion of Chat Models" (2024), "SCE".
    Elsewhere: mergekit `sce`, whose `select_topk` is the density: elects + where the sum is 0, and chooses arbitrarily among equal variances.
    """
    if density == 0 or not place.numel:
        return base
    terms = [model - base for model in models]
    if density < 1:
        spread = _spread(terms)
        varied = yield count(spread)
        if not varied:
            return base
        least = 0.0
        if kept_count(density, varied) < varied:
            least = yield kth(spread, place.numel - kept_count(density, varied) + 1)
        mask = without_smaller(spread, least).sign_()
        terms = [term.mul_(mask) for term in terms]
    wide = [term.to(torch.float64) for term in terms]
    energies = yield tuple(dot(x, x) for x in wide)
    found = [(term, energy / sum(energies)) for term, energy in zip(terms, energies, strict=True) if energy > 0]
    if not found:
        return base
    signs = signs_of([term for term, _ in found], "magnitude")
    shares = [share for _, share in found]
    agreed, divisor = elected([term.mul_(share) for term, share in found], shares, signs)
    return base + agreed.div_(divisor)


def _spread(terms: Sequence[Tensor]) -> Tensor:
    """Return a multiple of each element's variance: exactly 0 where all are equal."""
    offsets = [term - terms[0] for term in terms[1:]]
    whole = torch.zeros_like(terms[0])
    for offset in offsets:
        whole.add_(offset)
    squares = whole * whole  # the first term's own: its offset is 0
    for offset in offsets:
        centered = offset.mul_(len(terms)).sub_(whole)
        squares.add_(centered.mul_(centered))
    return squares


@method(version=1)
def ram(base: Tensor, /, *models: Tensor, epsilon: Positive = 1e-5, r: Positive = 0.0, alpha: Positive = 0.2) -> Measured:
    """Average what several models changed, and add in full what only one changed: `base + sum of d[i] / number of models that changed it`.

    d[i] is models[i] - base where that is a change, elsewhere 0.

    epsilon: only what is larger is a change.
    r: how much to strengthen what only one model changed: `1 + r * min(shared / unique, alpha)` times, by how many of the elements that the model
        changed in the tensor others changed too, and how many not. 0 asks nothing of the tensor.
    alpha: see `r`.

    Origin: "Reinforced Agent Merging" (arXiv 2601.13572).
    Elsewhere: mergekit `ram`; `ramplus_tl` with `r = 0.1`.
    """
    terms = [torch.nn.functional.hardshrink(model - base, epsilon) for model in models]
    changed = [term.sign().abs_() for term in terms]
    counts = torch.zeros_like(base)
    for mask in changed:
        counts.add_(mask)
    if r > 0 and alpha > 0 and len(models) > 1:
        alone = counts.eq(1).to(base.dtype)
        unique = [mask * alone for mask in changed]
        answers = yield (*(count(mask) for mask in unique), *(count(mask) for mask in changed))
        for n, term in enumerate(terms):
            share = (answers[len(models) + n] - answers[n]) / max(answers[n], 1)
            term.mul_(unique[n].mul_(r * min(share, alpha)).add_(1))
    total = torch.zeros_like(base)
    for term in terms:
        total.add_(term)
    return base + total.div_(counts.clamp_(min=1))


@method(version=1)
def nearswap(a: Tensor, b: Tensor, /, *, t: Positive) -> Tensor:
    """Take over what is nearly the same, and of the rest a step of one length: `a + clamp(b - a, -t, t)`.

    t: how far an element may move; where `b` is no further away, the result is `b`.

    Origin: alchemonaut, QuartetAnemoi-70B-t0.0001.
    Elsewhere: mergekit `nearswap`, where `a` is the base model. It writes `w * b + (1 - w) * a` with `w = clip(t / |a - b|, 0, 1)`.
    """
    if t == 0:
        return a
    step = b - a
    return torch.where(step.abs() <= t, b, a + step.clamp(-t, t))


@method(version=1, cut="rows")
def arcee_fusion(base: Tensor, a: Tensor, /, *, fence: Ratio = 1.5, place: Place) -> Measured:
    """Take over only what matters most: `a where the importance is at least median + fence * (upper - lower quartile), else base`.

    The importance of an element is |a - base| times its row's divergence KL(softmax(a) || softmax(base)), rounded to float32; rows are of the last
    dimension, and those of one element have none. Quartiles are of the whole tensor, with linear interpolation between two elements.

    fence: how many interquartile ranges above the median the importance must be.

    Origin: Arcee AI, "Arcee Fusion".
    Elsewhere: mergekit `arcee_fusion`, which takes quartiles of a million elements at random, without a seed and without interpolation, and adds 1e-8
        to each probability.
    """
    if not place.numel:
        return base
    importance = _importance(base, a)
    ranks = {q: (q * (place.numel - 1) // 4 + 1, q * (place.numel - 1) % 4 / 4) for q in (1, 2, 3)}  # of the element before, and how far after it
    asked = sorted({rank + step for rank, rest in ranks.values() for step in (0, 1) if rest or not step})
    known = dict(zip(asked, (yield tuple(kth(importance, rank) for rank in asked)), strict=True))
    lower, median, upper = (known[rank] + (known.get(rank + 1, 0.0) - known[rank]) * rest if rest else known[rank] for rank, rest in ranks.values())
    threshold = median + fence * (upper - lower)
    return torch.where(importance.to(torch.float64) >= threshold, a, base)


def _importance(base: Tensor, a: Tensor) -> Tensor:
    """Return each element's importance; KL is written without logarithms of elements: mean of the difference, less the growth of the whole."""
    x, o = a.to(torch.float64), base.to(torch.float64)
    tops = [wide.amax(dim=1, keepdim=True) for wide in (x, o)]
    weights = exp(x - tops[0])
    whole, before = row_sums(weights), row_sums(exp(o - tops[1]))
    delta = x - o
    mean = row_sums(weights * delta) / whole
    divergence = mean.sub_(log(whole / before)).sub_((tops[0] - tops[1]).squeeze(1)).clamp_(min=0)
    return delta.abs_().mul_(divergence.unsqueeze(1)).to(torch.float32)
