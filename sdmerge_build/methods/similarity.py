"""Owns the methods that decide how much to take of each model by how the models compare: element by element, by column, or as a whole.

Has never heard of dtypes or blocks. A column is what belongs to one input of a layer: the elements that differ in the first dimension alone.
What a model has nothing of, zeros, is like nothing: its cosine with anything is 0, where other tools divide 0 by 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from sdmerge_build.methods import Findings, Place, Ratio, Survey, Unit, method, scalars
from sdmerge_build.methods.elementary import cos_pi, exp, log, power, sqrt
from sdmerge_build.methods.linear import weighted_sum
from sdmerge_build.methods.measures import columns, dot, row_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = [
    "add_cosine_a",
    "add_cosine_b",
    "add_perpendicular",
    "cosine_a",
    "cosine_b",
    "euclidean_add_difference",
    "geometric_sum",
    "inverse_smoothstep_sum",
    "maximum",
    "multiply_difference",
    "multiply_quotient",
    "sigmoid_sum",
    "similarity_add_difference",
    "smoothstep_sum",
]

_VAE = ("first_stage_model.", "vae.")


def _cosines(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    """Return the cosine of every column, given the sums of their products."""
    norm = sqrt(aa) * sqrt(bb)
    return (ab / norm.masked_fill(norm == 0, 1)).clamp(-1, 1)


def _alike_a(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    """Return for every column the mean of its cosine and that of the tensors, of which all columns were scaled to length 1 before."""
    cosines = _cosines(ab, aa, bb)
    norm = math.sqrt(int(aa.count_nonzero())) * math.sqrt(int(bb.count_nonzero()))
    return (cosines + (row_sums(cosines[None]).item() / norm if norm else 0.0)) * 0.5


def _alike_b(ab: Tensor, aa: Tensor, bb: Tensor, *, of_nothing: float = 0.0) -> Tensor:
    """Return for every column the mean of its cosine and that of the tensors."""
    dot_ab, dot_aa, dot_bb = row_sums(torch.stack([ab, aa, bb])).tolist()
    norm = math.sqrt(dot_aa) * math.sqrt(dot_bb)
    return (_cosines(ab, aa, bb) + (dot_ab / norm if norm else of_nothing)) * 0.5


def _mixed(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Mix by the share of `b`, 0…1, of every column; exactly `a` at 0, `b` at 1, and both where they are equal."""
    share = share.to(a.dtype) + 0.0  # a clamped zero may have either sign
    is_a = share <= 0.5
    return a.where(is_a, b) + (b - a) * share.where(is_a, share - 1)


@method(version=2, cut="filters")
def add_cosine_a(a: Tensor, b: Tensor, /, *, alpha: Ratio = 1.0) -> Generator[Any, Any, Tensor]:
    """Take of `b` the columns that are unlike those of `a`: `(1 - k) * a + k * b`, `k = 1 - clip(cos - alpha, 0, 1)`.

    alpha: what is taken off the cosine of the two columns; from 1 on the result is `b`.

    Origin: sd-mecha `add_cosine_a`.
    Elsewhere: not supermerger's "cosineA", which compares with all columns of both models: that is `cosine_a`. sd-mecha scales every column to
        length 1 before it takes the cosine, which changes nothing, and merges the VAE like everything else, as this does.
    """
    if alpha >= 1:
        return b
    cosines = _cosines(*(yield columns(a, b), columns(a, a), columns(b, b)))
    return _mixed(a, b, 1 - (cosines - alpha).clamp(0, 1))


@method(version=2, cut="filters")
def add_cosine_b(a: Tensor, b: Tensor, /, *, alpha: Ratio = 1.0) -> Generator[Any, Any, Tensor]:
    """Take of `b` the columns that are unlike those of `a`, tensor and column counting alike: `(1 - k) * a + k * b`, `k = 1 - clip(s - alpha, 0, 1)`.

    alpha: what is taken off `s`, the mean of the cosine of the two columns and the cosine of the two tensors; from 1 on the result is `b`.

    Origin: sd-mecha `add_cosine_b`.
    Elsewhere: not supermerger's "cosineB": that is `cosine_b`. In sd-mecha a tensor of zeros makes a tensor of NaN; here its cosines are 0.
    """
    if alpha >= 1:
        return b
    alike = _alike_b(*(yield columns(a, b), columns(a, a), columns(b, b)))
    return _mixed(a, b, 1 - (alike - alpha).clamp(0, 1))


def _range_a(models: Any, /) -> Findings:
    """Find between which cosines the columns of two models lie."""
    return _range(models, _cosines)


def _range_b(models: Any, /) -> Findings:
    """Find between which similarities the columns of two models lie; a tensor of zeros has none."""
    return _range(models, lambda *sums: _alike_b(*sums, of_nothing=math.nan))


def _range(models: Any, alike: Callable[..., Tensor]) -> Findings:
    """Find the least and the largest number of all columns but those of the VAE, the outermost hundredths at both ends left out."""

    def question(a: Tensor, b: Tensor) -> Generator[Any, Any, Tensor]:
        return alike(*(yield columns(a, b), columns(a, a), columns(b, b)))

    names = [name for name in models.names if not name.startswith(_VAE)]
    found = torch.cat([torch.empty(0, dtype=torch.float64), *models.map(lambda name: models.ask(name, question, "filters"), names)])
    found = found[~found.isnan()].sort().values
    if not len(found):
        return {"low": 0.0, "high": 0.0}
    found = found[found >= _percentile(found, 1)]
    found = found[found <= _percentile(found, 99)]
    return {"low": found[0].item(), "high": found[-1].item()}


def _percentile(ascending: Tensor, percent: int) -> float:
    """Return what NumPy calls the percentile by the method `midpoint`."""
    at = (len(ascending) - 1) * (percent / 100)
    low, high = ascending[math.floor(at)].item(), ascending[math.ceil(at)].item()
    return high - (high - low) * 0.5


def _share_of_a(alike: Tensor, findings: Findings, alpha: float) -> Tensor:
    """Return where in the range of all columns each one lies, less alpha; where all columns are alike, all count as the most alike."""
    low, high = findings["low"], findings["high"]
    scaled = (alike - low) / (high - low) if high > low else torch.ones_like(alike)
    return (scaled - alpha).clamp(0, 1)


@method(version=2, cut="filters", survey=Survey(name="cosine_a", version=2, function=_range_a))
def cosine_a(a: Tensor, b: Tensor, /, *, alpha: Ratio, findings: Findings, place: Place) -> Generator[Any, Any, Tensor]:
    """Keep of `a` the columns that are most alike in both models: `k * a + (1 - k) * b`, `k = clip((s - low) / (high - low) - |alpha|, 0, 1)`.

    alpha: what is taken off the share of `a`; its sign does not matter. `s` is the mean of the cosine of the two columns and the cosine of the
        two tensors with all columns scaled to length 1; `low` and `high` are the range of the cosines of all columns of the two models.

    Origin: supermerger "cosineA".
    Elsewhere: Chattiori "cosineA"; sd-mecha `add_cosine_a` has no range. As in supermerger the VAE, `first_stage_model.` or `vae.`, is that of
        `a`, and counts nowhere; the outermost hundredths of the cosines are left out of the range. The result of one tensor depends on all
        others. Where all cosines are equal supermerger makes NaN; here `k = clip(1 - |alpha|, 0, 1)`. model-mixer drops its result.
    """
    if place.name.startswith(_VAE):
        return a
    alike = _alike_a(*(yield columns(a, b), columns(a, a), columns(b, b)))
    return _mixed(b, a, _share_of_a(alike, findings, abs(alpha)))


@method(version=2, cut="filters", survey=Survey(name="cosine_b", version=2, function=_range_b))
def cosine_b(a: Tensor, b: Tensor, /, *, alpha: Ratio, findings: Findings, place: Place) -> Generator[Any, Any, Tensor]:
    """Keep of `a` what is most alike in both models, tensor and column: `k * a + (1 - k) * b`, `k = clip((s - low) / (high - low) - alpha, 0, 1)`.

    alpha: what is taken off the share of `a`. `s` is the mean of the cosine of the two columns and the cosine of the two tensors; `low` and `high`
        are the range of `s` over all columns of the two models.

    Origin: supermerger "cosineB".
    Elsewhere: Chattiori "cosineB"; sd-mecha `add_cosine_b` has no range. VAE, range and equal similarities are as in `cosine_a`. A tensor of
        zeros makes NaN in supermerger; here its cosines are 0, and it counts in the range as little as there.
    """
    if place.name.startswith(_VAE):
        return a
    alike = _alike_b(*(yield columns(a, b), columns(a, a), columns(b, b)))
    return _mixed(b, a, _share_of_a(alike, findings, alpha))


@method(version=1)
def similarity_add_difference(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio, beta: Ratio) -> Tensor:
    """Mix where `a` and `b` are similar, add the difference where not: `(1 - s) * (a + alpha * (b - c)) + s * ((1 - alpha / 2) * a + alpha / 2 * b)`.

    alpha: how much of `b`, or of its difference.
    beta: how much similarity counts: `s = beta * (a * b / max(|a|, |b|)² + 1) / 2`, which is `beta` where both are 0.

    Origin: sd-meh `similarity_add_difference`.
    Elsewhere: Chattiori "SIM", which in newer versions moves the result halfway to the mean and the deviation of `a`. Both compute in the
        dtype of the file, in which the squares of small weights vanish.
    """
    if alpha == 0:
        return a
    larger = a.abs().maximum(b.abs())
    similarity = (((a / larger) * (b / larger)).masked_fill(larger == 0, 1) + 1) * (beta / 2)
    return a + ((b - c) * (1 - similarity) + (b - a) * (similarity * 0.5)) * alpha


@method(version=1)
def multiply_difference(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Unit, beta: Ratio) -> Tensor:
    """Add the geometric mean of two differences: `c + copysign(|a - c|^(1 - alpha) * |b - c|^alpha, (1 - beta) * a + beta * b - c)`.

    alpha: how much of the difference of `b`; what only one of the two changed stays `c`, unless it is 0 or 1.
    beta: whose sign: that of the mixture with this much of `b`.

    Origin: sd-meh `multiply_difference`.
    Elsewhere: Chattiori "MD". Both round the differences to the dtype of the file before multiplying, and take any `alpha`: beyond 0…1 the
        result is infinite wherever a model changed nothing.
    """
    if alpha == beta and alpha in {0, 1}:
        return b if alpha else a
    x, y = a.double() - c, b.double() - c
    return c + (power(x.abs(), 1 - alpha) * power(y.abs(), alpha)).copysign(x * (1 - beta) + y * beta)


@method(version=3)
def euclidean_add_difference(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Unit) -> Generator[Any, Any, Tensor]:
    """Add the root mean square of two differences, scaled to the length of their mixture: `c + |m| * d / |d|`.

    alpha: how much of `b`: `m = (1 - alpha) * a + alpha * b - c`, `d = copysign(√((1 - alpha) * x² + alpha * y²), m)`, where `x` and `y` are
        the differences of `a` and `b` from `c`, scaled to length 1.

    Origin: sd-meh `euclidean_add_difference`.
    Elsewhere: where neither model differs from `c`, sd-meh makes NaN; here the tensor stays as it is.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    x, y = a.double() - c, b.double() - c
    mixture = x * (1 - alpha) + y * alpha
    of_x, of_y, of_mixture = yield dot(x, x), dot(y, y), dot(mixture, mixture)
    if not of_x and not of_y:
        return a
    length = math.sqrt((1 - alpha if of_x else 0.0) + (alpha if of_y else 0.0))
    root = sqrt(x * x * ((1 - alpha) / of_x if of_x else 0.0) + y * y * (alpha / of_y if of_y else 0.0))
    return c + root.copysign(mixture) * (math.sqrt(of_mixture) / length)


@method(version=1)
def multiply_quotient(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0) -> Tensor:
    """Multiply by what `b` changed where `a` changed the opposite: `Re(a * (b / c)^(alpha * s))`.

    alpha: how much of the change. `s = max(0, -p * q / max(|p|, |q|)²)`, where `p` and `q` are the logarithms of `|a / c|` and `|b / c|`.
        Where a model has 0, `s` is 0. A power of a negative quotient is complex: its principal value counts.

    Origin: sd-mecha `multiply_quotient`.
    Elsewhere: nowhere. sd-mecha takes `a` for any NaN, and so hides those that `b` and `c` came with; here they come out.
    """
    if alpha == 0:
        return a
    log_c = log(c.abs())
    p, q = log(a.abs()) - log_c, log(b.abs()) - log_c
    larger = p.abs().maximum(q.abs())
    opposed = ((p / larger) * (q / larger)).neg_()
    opposed.masked_fill_((larger == 0) | (a == 0) | (b == 0) | (c == 0), 0)
    share = opposed.clamp_(min=0) * alpha
    factor = exp(q.masked_fill_(share == 0, 0) * share)
    is_turned = (b < 0) != (c < 0)
    factor[is_turned] *= cos_pi(share[is_turned])
    return a * factor


@method(version=1)
def geometric_sum(a: Tensor, b: Tensor, /, *, alpha: Unit = 0.5) -> Tensor:
    """Take the geometric mean of two models: `Re(a^(1 - alpha) * b^alpha)`.

    alpha: how much of `b`. A power of a negative number is complex: its principal value counts, so numbers of different signs give less.

    Origin: sd-mecha `geometric_sum`.
    Elsewhere: Chattiori "GEO" takes real powers: NaN for every negative weight. sd-mecha takes any `alpha`: beyond 0…1 zeros make infinity.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    product = (power(a.abs(), 1 - alpha) * power(b.abs(), alpha)).copysign(a)
    turned = cos_pi(product.new_tensor(alpha)).item()
    return product.where((a < 0) == (b < 0), product * turned)


@method(version=1)
def sigmoid_sum(a: Tensor, b: Tensor, /, *, alpha: Ratio) -> Tensor:
    """Sum two models by sigmoids: `σ(4 * alpha) * (a + b) - σ(alpha) * a`, `σ(x) = 1 / (1 + e^-x)`.

    alpha: how much of both. The weights do not sum to 1: 0 gives half of `b`, and much gives `b`.

    Origin: Chattiori "SIG".
    Elsewhere: not AUTOMATIC1111's "Sigmoid", which is `smoothstep_sum`.
    """
    both, less = 1 / (1 + scalars.exp(-4 * alpha)), 1 / (1 + scalars.exp(-alpha))
    return a * (both - less) + b * both


@method(version=1)
def maximum(a: Tensor, b: Tensor, /) -> Tensor:
    """Take the larger of two weights: `max(a, b)`.

    Origin: Chattiori "MAX".
    Elsewhere: nowhere.
    """
    return a.where((a >= b) | a.isnan(), b)  # of 0 and -0 each CPU has another maximum


@method(version=1)
def smoothstep_sum(a: Tensor, b: Tensor, /, *, alpha: Unit = 0.5) -> Tensor:
    """Mix two models by a ratio that is slow at both ends: `(1 - t) * a + t * b`, `t = alpha² * (3 - 2 * alpha)`.

    alpha: how much of `b`, before it is bent.

    Origin: AUTOMATIC1111 until November 2022, "Sigmoid".
    Elsewhere: merge-board; diffusers' CheckpointMergerPipeline "sigmoid". Not Chattiori "SIG", which is `sigmoid_sum`.
    """
    return weighted_sum(a, b, alpha=alpha * alpha * (3 - 2 * alpha))


@method(version=1)
def inverse_smoothstep_sum(a: Tensor, b: Tensor, /, *, alpha: Unit = 0.5) -> Tensor:
    """Mix two models by a ratio that is fast at both ends: `(1 - t) * a + t * b`, `t = ½ - sin(asin(1 - 2 * alpha) / 3)`.

    alpha: how much of `b`, before it is bent; `smoothstep_sum` bends `t` back to it.

    Origin: AUTOMATIC1111 until November 2022, "Inverse Sigmoid".
    Elsewhere: merge-board; diffusers' CheckpointMergerPipeline "inv_sigmoid".
    """
    third = scalars.acos(1 - 2 * min(alpha, 1 - alpha)) / 3
    half = scalars.sin(third / 2)
    near = half * half + math.sqrt(0.75) * scalars.sin(third)  # the same function, without cancellation near 0
    return weighted_sum(a, b, alpha=near if alpha <= 0.5 else 1 - near)


@method(version=3)
def add_perpendicular(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0) -> Generator[Any, Any, Tensor]:
    """Add what `b` learned and `a` did not: `a + alpha * (y - x * (x·y) / (x·x))`, `x = a - c`, `y = b - c`.

    alpha: how much of it.

    Origin: sd-mecha `add_perpendicular`.
    Elsewhere: where `a` learned nothing in a tensor, sd-mecha leaves out what `b` learned there; here all of it is added.
    """
    if alpha == 0:
        return a
    x, y = a - c, b - c
    of_x, of_both = yield dot(x, x), dot(x, y)
    return a + (y - x * (of_both / of_x if of_x else 0.0)) * alpha
