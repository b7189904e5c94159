"""Owns DoRA: changes whose result is given the lengths that a trainer stored.

Has never heard of the kinds of changes.

S.-Y. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge_build.methods import elementary
from sdmerge_build.methods.measures import row_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sdmerge_build.methods.deltas import Delta
else:
    from sdmerge_build.methods.late import torch

__all__ = ["Decomposed", "is_on_input"]

Shape = tuple[int, ...]


def is_on_input(scale: Shape, shape: Shape) -> bool:
    """Tell from the shape of `dora_scale` whether it has a length for each input channel instead of each output channel."""
    return len(scale) > 1 and scale[0] == 1 != shape[0]


class Decomposed:
    """DoRA: `W + s · (m ⊙ (W + Δ) / (‖·‖ + ε) - W)`, where m is `dora_scale`, Δ has strength 1, and ε is that of the dtype.

    ‖·‖ are the lengths of the rows of W + Δ where m is on the output, and of its input channels where m is on the input, as in training: peft
    `tuners/lora/dora.py`, LyCORIS `apply_weight_decompose`. On the output, ComfyUI (`comfy/weight_adapter/base.py`) takes the rows of W instead;
    its ε is ours, 2⁻²³ in float32.
    """

    def __init__(self, delta: Delta, scale: Tensor, shape: Shape, strength: float, *, is_wide: bool) -> None:
        self._delta, self._strength = delta, strength
        self._epsilon = 2.0**-52 if is_wide else 2.0**-23
        self._is_on_input = is_on_input(tuple(scale.shape), shape)
        self._channels = shape[1] if len(shape) > 1 else 1
        self._scale = scale.reshape(-1, 1).to(torch.float64)

    def of(self, weights: Tensor, first: int) -> Tensor:
        """Return what is added to rows; of a whole tensor where lengths are those of input channels."""
        wide = weights.to(torch.float64)
        changed = wide + self._delta.of(weights, first)
        if self._is_on_input:
            channels = changed.view(len(wide), self._channels, -1)
            ratios = self._ratios(channels.transpose(0, 1).flatten(1), 0)
            changed = (channels * ratios).view(wide.shape)
        else:
            changed = changed * self._ratios(changed, first)
        return changed.sub_(wide).mul_(self._strength)

    def _ratios(self, rows: Tensor, first: int) -> Tensor:
        lengths = elementary.sqrt(row_sums(rows * rows)).add_(self._epsilon).unsqueeze(1)
        return self._scale[first : first + len(rows)] / lengths
