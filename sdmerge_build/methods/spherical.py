"""Owns the methods that go along arcs, or turn rows, instead of straight from model to model.

Has never heard of blocks. The geometry lives in `arcs`, the matrices in `procrustes`; both load torch, when a model is merged.
Tensors are read once more, for their dot products, which are summed in float64, and shares are computed of them. Arcs between two models are
then sums in the step's dtype, as `weighted_sum` is; the rest is computed in float64 and rounded once: elements are within 1e-15 of the vector's
length of what a float64 computation with the directions themselves gives, and within 1e-8 where directions nearly cancel out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sdmerge_build.methods import Positive, Ratio, method

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

__all__ = [
    "karcher",
    "multislerp",
    "multislerp_differences",
    "nuslerp",
    "nuslerp_columns",
    "nuslerp_differences",
    "nuslerp_rows",
    "rotate",
    "slerp",
    "slerp_vectors",
]


@method(version=3)
def slerp(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor | Generator[Any, Any, Tensor]:
    """Turn `a` towards `b`, and mix their lengths: `(sin((1 - alpha) * w) * a / |a| + sin(alpha * w) * b / |b|) / sin(w) * mix(|a|, |b|)`.

    alpha: how far towards `b`; `w` is the angle between the tensors, each one vector.

    Origin: sd-mecha `slerp`.
    Elsewhere: mergekit's is `slerp_vectors`. Where one is zero, or they are equal, or opposite to within 1e-4, no arc joins them, and they are
        mixed as in `weighted_sum`; sd-mecha mixes only where NaN appears, so that opposite tensors give rounding errors.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    from sdmerge_build.methods.arcs import on_sphere  # noqa: PLC0415  loads torch

    return on_sphere(a, b, alpha)


@method(version=3)
def slerp_vectors(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor | Generator[Any, Any, Tensor]:
    """Mix two models by the shares of an arc, unless they are nearly parallel: `(sin((1 - alpha) * w) * a + sin(alpha * w) * b) / sin(w)`.

    alpha: how far towards `b`; `w` is the angle between the tensors, each one vector. Where its cosine is above 0.9995 or below -0.9995, as
        it is for most models tuned from one base, the mixture is that of `weighted_sum`.

    Origin: mergekit `slerp`; its `t` is `alpha`, its `base_model` is `a`.
    Elsewhere: sd-mecha's is `slerp`, which mixes directions and lengths apart; without the exception for parallel tensors it is `nuslerp`.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    from sdmerge_build.methods.arcs import on_arc  # noqa: PLC0415  loads torch

    return on_arc(a, b, alpha, flattest=0.9995)


@method(version=3)
def nuslerp(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor | Generator[Any, Any, Tensor]:
    """Mix two models by the shares of an arc: `(sin((1 - alpha) * w) * a + sin(alpha * w) * b) / sin(w)`.

    alpha: how far towards `b`; `w` is the angle between the tensors, each one vector.

    Origin: mergekit `nuslerp`; `alpha` is the second model's weight divided by the sum of both, or 0.5 where that is 0.
    Elsewhere: mergekit's `base_model` makes it `nuslerp_differences`, `nuslerp_flatten: false` makes it `nuslerp_rows`. Where one is zero, or they
        are equal, or opposite to within 1e-4, they are mixed as in `weighted_sum`; mergekit does so where the sine of the angle is below 1e-8.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    from sdmerge_build.methods.arcs import on_arc  # noqa: PLC0415  loads torch

    return on_arc(a, b, alpha)


@method(version=3)
def nuslerp_differences(base: Tensor, a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor | Generator[Any, Any, Tensor]:
    """Mix what two models learned by the shares of an arc: `base + (sin((1 - alpha) * w) * (a - base) + sin(alpha * w) * (b - base)) / sin(w)`.

    alpha: how far towards `b`; `w` is the angle between the differences, each one vector.

    Origin: mergekit `nuslerp` with a `base_model`; `alpha` as for `nuslerp`.
    Elsewhere: mergekit computes in the dtype of the files, in which differences have few digits.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    from sdmerge_build.methods.arcs import on_arc  # noqa: PLC0415  loads torch

    return on_arc(a, b, alpha, base)


@method(version=1, cut="rows")
def nuslerp_rows(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor:
    """Mix each row by the shares of an arc of its own: `nuslerp` for every row along the last dimension.

    alpha: how far towards `b`.

    Origin: mergekit `nuslerp` with `nuslerp_flatten: false`.
    Elsewhere: with a `base_model`, `subtract` it from both models before and `add` it after.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    from sdmerge_build.methods.arcs import on_row_arcs  # noqa: PLC0415  loads torch

    return on_row_arcs(a, b, alpha)


@method(version=2, cut="filters")
def nuslerp_columns(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor | Generator[Any, Any, Tensor]:
    """Mix each column by the shares of an arc of its own: `nuslerp` for every vector along the first dimension.

    alpha: how far towards `b`.

    Origin: mergekit `nuslerp` with `nuslerp_flatten: false` and `nuslerp_row_wise: true`, which despite its name goes along the first dimension.
    Elsewhere: with a `base_model`, `subtract` it from both models before and `add` it after.
    """
    if alpha in {0, 1}:
        return b if alpha else a
    from sdmerge_build.methods.arcs import on_column_arcs  # noqa: PLC0415  loads torch

    return on_column_arcs(a, b, alpha)


@method(version=3)
def multislerp(*models: Tensor, weights: list[Ratio], normalize: bool = True) -> Tensor | Generator[Any, Any, Tensor]:
    """Go to the weighted mean of directions and lengths: `u / |u| * (weights[0] * |models[0]| + …)`, `u = weights[0] * models[0] / |models[0]| + …`.

    weights: one per model.
    normalize: whether weights are divided by their sum first, which then must not be 0.

    Origin: mergekit `multislerp`.
    Elsewhere: mergekit's step in the tangent space is left out: for the mean it starts from it is zero but for rounding. Where directions cancel
        out to within 1e-4 of the weights, the result is the sum of `linear`; mergekit does so for two models, and fails for more.
    """
    return _multislerp(None, models, weights, normalize=normalize)


@method(version=3)
def multislerp_differences(base: Tensor, /, *models: Tensor, weights: list[Ratio], normalize: bool = True) -> Tensor | Generator[Any, Any, Tensor]:
    """Add to a base the weighted mean, in direction and length, of what models learned since: `base + multislerp(models[0] - base, …)`.

    weights: one per model.
    normalize: whether weights are divided by their sum first, which then must not be 0.

    Origin: mergekit `multislerp` with a `base_model`.
    Elsewhere: see `multislerp`.
    """
    return _multislerp(base, models, weights, normalize=normalize)


def _multislerp(base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor | Generator[Any, Any, Tensor]:
    total = math.fsum(weights) if normalize else 1.0
    weighted = [(model, weight / total if total else math.nan) for model, weight in zip(models, weights, strict=True) if weight != 0 or not total]
    if not weighted:
        return models[0] * 0.0 if base is None else base
    if [weight for _, weight in weighted] == [1]:
        return weighted[0][0]
    from sdmerge_build.methods.arcs import middle  # noqa: PLC0415  loads torch

    return middle([model for model, _ in weighted], [weight for _, weight in weighted], base)


@method(version=3)
def karcher(*models: Tensor, iterations: int = 10, tolerance: Positive = 1e-5) -> Tensor | Generator[Any, Any, Tensor]:
    """Go to where the squares of the angles to all models add up to the least, with the mean of their lengths: `u * (|models[0]| + …) / N`.

    iterations: at most how many steps are made towards it from the mean of directions.
    tolerance: a step shorter than this, in radians, is the last; so is a direction left out of a step that is as near.

    Origin: mergekit `karcher`, its `max_iter` and `tol`.
    Elsewhere: tensors of zeros have no direction, but count in the mean of lengths; mergekit also leaves out the directions of those shorter than
        `tol`. Where directions cancel out to within 1e-4, the result is that of `average`; mergekit starts from the first model's.
    """
    if len(models) == 1:
        return models[0]
    from sdmerge_build.methods.arcs import middle  # noqa: PLC0415  loads torch

    return middle(models, [1 / len(models)] * len(models), most=iterations, tolerance=tolerance)


@method(version=1, cut="nowhere", pinned=True)
def rotate(a: Tensor, b: Tensor, /, *, alignment: Ratio = 1.0, alpha: Ratio = 0.0, centralization: Ratio = 1.0) -> Tensor:
    """Turn the rows of `a` as a whole to where those of `b` are: `mix(a, b * transpose(q), alpha) * q ** alignment`, `q` the best such rotation.

    alignment: how far rows are turned; they also move by this share of the difference of their means.
    alpha: how much of `b`, turned to where `a` is, is mixed in before.
    centralization: how much of their mean is taken from rows before.

    Origin: sd-meh `rotate` (`alpha` is the alignment, `beta` is `alpha`), sd-mecha `rotate`.
    Elsewhere: rows are entries of the first dimension; of k × k filters, each k × k. Vectors are mixed by `alpha`; sd-meh mixes vectors by the
        alignment, and such filters by `alpha`. Both other tools mix tensors that are equal in float16. Where rows are longer than there are rows,
        sd-mecha's `q` is no rotation, and its basis is random without a seed; here it turns in the space of both models' rows alone, and there
        as little as it can. Caches of other tools are 16 bits wide; here all is float64. No reflection is used for fractions of a turn.
    """
    if (alignment, alpha) in {(0, 0), (1, 1)}:
        return b if alpha else a
    if a.dim() <= 1:
        return a * (1 - alpha) + b * alpha
    from sdmerge_build.methods.procrustes import rotated  # noqa: PLC0415  loads torch

    return rotated(a, b, alignment, alpha, centralization)
