"""Owns the methods that are weighted sums of models.

Has never heard of dtypes or blocks: models arrive as tensors in the step's compute dtype, ratios as numbers for the tensor at hand.
Each is written as separate multiplications and additions: `lerp`, `add(alpha=)` and `addcmul` round differently from one CPU to the next.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sdmerge_build.methods import Ratio, method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "add",
    "add_difference",
    "average",
    "linear",
    "scale",
    "subtract",
    "sum_twice",
    "triple_sum",
    "weighted_subtraction",
    "weighted_sum",
]


@method(version=1)
def weighted_sum(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor:
    """Mix two models: `(1 - alpha) * a + alpha * b`.

    alpha: how much of `b`.

    Origin: AUTOMATIC1111, `modules/extras.py`, "Weighted sum".
    Elsewhere: supermerger "Weight"; sd-meh and sd-mecha `weighted_sum`; Chattiori "WS"; model-mixer "Sum"; ComfyUI ModelMergeSimple, whose
        ratio is the share of the FIRST model: write 1 minus it here.
    """
    return a * (1 - alpha) + b * alpha


@method(version=1)
def add_difference(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0) -> Tensor:
    """Add to `a` what `b` learned since `c`: `a + alpha * (b - c)`.

    alpha: how much of the difference.

    Origin: AUTOMATIC1111, `modules/extras.py`, "Add difference".
    Elsewhere: supermerger "Add"; sd-meh and sd-mecha `add_difference`; Chattiori "AD"; model-mixer "Add-Diff"; mergekit `task_arithmetic`;
        ComfyUI ModelMergeSubtract and ModelMergeAdd. Old scripts and diffusers' CheckpointMergerPipeline compute `a + (1 - alpha) * (b - c)`.
    """
    return a + (b - c) * alpha


@method(version=1)
def linear(*models: Tensor, weights: list[Ratio]) -> Tensor:
    """Sum any number of models, each times its weight: `weights[0] * models[0] + weights[1] * models[1] + …`.

    weights: one per model; they need not sum to 1.

    Origin: mergekit `linear`, kohya `tools/merge_models.py`.
    Elsewhere: mergekit divides by the sum of the weights unless `normalize` is false; kohya does not, and its ratios are 1/N unless said.
    """
    terms = [model * weight for model, weight in zip(models, weights, strict=True) if weight != 0]
    total = terms[0] if terms else models[0] * 0.0
    for term in terms[1:]:
        total = total + term
    return total


@method(version=1)
def average(*models: Tensor) -> Tensor:
    """Average any number of models: `(models[0] + models[1] + …) / N`.

    Origin: sd-mecha `n_average`.
    Elsewhere: kohya `tools/merge_models.py` without ratios; mergekit `linear` with equal weights. sd-mecha keeps a running mean, which
        differs in the last bits and depends on the order.
    """
    total = models[0]
    for model in models[1:]:
        total = total + model
    return total * (1 / len(models))


@method(version=1)
def triple_sum(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio, beta: Ratio) -> Tensor:
    """Mix three models: `(1 - alpha - beta) * a + alpha * b + beta * c`.

    alpha: how much of `b`.
    beta: how much of `c`; with `alpha` it may exceed 1, and `a` is then subtracted.

    Origin: supermerger "Triple".
    Elsewhere: sd-meh `triple_sum`; Chattiori "TRS". supermerger nests two mixtures, which differs in the last bits.
    """
    return a * (1 - alpha - beta) + b * alpha + c * beta


@method(version=1)
def sum_twice(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio, beta: Ratio) -> Tensor:
    """Mix two models, and the result with a third: `(1 - beta) * ((1 - alpha) * a + alpha * b) + beta * c`.

    alpha: how much of `b` in the first mixture.
    beta: how much of `c` in the second.

    Origin: supermerger "Twice".
    Elsewhere: sd-meh `sum_twice`; Chattiori "ST".
    """
    return (a * (1 - alpha) + b * alpha) * (1 - beta) + c * beta


@method(version=1)
def weighted_subtraction(a: Tensor, b: Tensor, /, *, alpha: Ratio, beta: Ratio = 1.0) -> Tensor:
    """Take a model out of a mixture it is in: `(a - alpha * beta * b) / (1 - alpha * beta)`.

    alpha: with `beta`, the share of `b` in `a`; their product must not be 1.
    beta: see `alpha`.

    Origin: sd-meh `weighted_subtraction`, the inverse of `weighted_sum` at the ratio `alpha * beta`.
    Elsewhere: sd-meh lowers `beta` by 1e-10 where both are 1, and the result explodes; here it is not finite, which is an error.
    """
    share = alpha * beta
    factor = 1 / (1 - share) if share != 1 else math.inf
    return (a - b * share) * factor


@method(version=1)
def subtract(a: Tensor, b: Tensor, /) -> Tensor:
    """Take the difference of two models, to be added to another: `a - b`.

    Origin: sd-mecha `subtract`.
    Elsewhere: ComfyUI ModelMergeSubtract with multiplier 1; a formula says the same: `A - B`.
    """
    return a - b


@method(version=1)
def add(a: Tensor, b: Tensor, /, *, alpha: Ratio = 1.0) -> Tensor:
    """Add a difference, or a model, to another: `a + alpha * b`.

    alpha: how much of `b`.

    Origin: ComfyUI ModelMergeAdd.
    Elsewhere: sd-mecha writes `a + b`; a formula says the same: `A + 0.5 * B`.
    """
    return a + b * alpha


@method(version=1)
def scale(a: Tensor, /, *, alpha: Ratio) -> Tensor:
    """Scale a model or a difference: `alpha * a`.

    alpha: the factor.

    Origin: sd-mecha `scale`, supermerger "self", model-mixer "Self".
    Elsewhere: supermerger and model-mixer leave out tensors named `to_out`, `proj_out` or `norm`, and supermerger does nothing at 0: say so
        with `rules`. model-mixer "Replace" is this with the other model; mergekit `passthrough` with `scale`.
    """
    return a * alpha
