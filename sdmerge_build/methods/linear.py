"""Owns the methods that are weighted sums of models.

Has never heard of dtypes or blocks: models arrive as tensors in the step's compute dtype, ratios as numbers for the tensor at hand.
Formulas: AUTOMATIC1111 `modules/extras.py` (`weighted_sum`, `add_difference`), mergekit (`linear`).
Each is written as separate multiplications and additions: `lerp`, `add(alpha=)` and `addcmul` round differently from one CPU to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge_build.methods import Ratio, method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_difference", "linear", "weighted_sum"]


@method(version=1)
def weighted_sum(a: Tensor, b: Tensor, /, *, alpha: Ratio = 0.5) -> Tensor:
    """Mix two models: `(1 - alpha) * a + alpha * b`."""
    return a * (1 - alpha) + b * alpha


@method(version=1)
def add_difference(a: Tensor, b: Tensor, c: Tensor, /, *, alpha: Ratio = 1.0) -> Tensor:
    """Add to `a` what `b` learned since `c`: `a + alpha * (b - c)`."""
    return a + (b - c) * alpha


@method(version=1)
def linear(*models: Tensor, weights: list[Ratio]) -> Tensor:
    """Sum any number of models, each times its weight: `weights[0] * models[0] + weights[1] * models[1] + …`."""
    terms = [model * weight for model, weight in zip(models, weights, strict=True) if weight != 0]
    total = terms[0] if terms else models[0] * 0.0
    for term in terms[1:]:
        total = total + term
    return total
