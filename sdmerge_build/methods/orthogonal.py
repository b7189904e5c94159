"""Owns OFT and BOFT: changes that turn the output channels of a tensor.

Has never heard of files or recipes. Both need the tensor in one piece. Rotations are found by eliminations written out element by element, so that
they are the same on every CPU.

Z. Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (2023); W. Liu et al., "Parameter-Efficient Orthogonal Finetuning via
Butterfly Factorization" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sdmerge_build.methods.measures import row_sums
from sdmerge_build.methods.products import Multiplier

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["Butterfly", "Rotated"]

_COLUMNS = 1024


class Rotated:
    """OFT: `W + s · (c ⊙ Rᵀ W - W)`, block by block along the first dimension, where R is a rotation and c `rescale`, or 1.

    R = (I + Q)(I - Q)⁻¹ with Q = blocks - blocksᵀ, after all of Q was shrunk to the length alpha · rows, where that is above 0 and below its own.
    Trainers and AUTOMATIC1111 have that limit (kohya-ss `networks/oft.py`, LyCORIS `diag_oft.py`); ComfyUI limits to alpha itself, squares the
    strength, and has no `rescale`.
    """

    def __init__(self, factors: Mapping[str, Tensor], rows: int, strength: float, *, is_wide: bool) -> None:
        self._turn = _rotations_less_one(factors["blocks"], _limit(factors, rows)).transpose(-1, -2)
        self._rescale = _rescale(factors)
        self._strength, self._is_wide = strength, is_wide

    def of(self, weights: Tensor, _: int) -> Tensor:
        """Return what is added to all rows."""
        return _by_columns(weights, self._some)

    def _some(self, weights: Tensor) -> Tensor:
        wide = weights.to(torch.float64)
        blocks = wide.reshape(len(self._turn), self._turn.shape[-1], -1)
        added = Multiplier(blocks, is_wide=self._is_wide).of(self._turn).view(wide.shape)
        if self._rescale is not None:
            added = added.add_(wide).mul_(self._rescale).sub_(wide)
        return added.mul_(self._strength)


class Butterfly:
    """BOFT: `W + s · (c ⊙ P W - W)`, where P is a product of rotations of blocks, each between two shuffles of rows.

    Factor i of m takes rows in the order (c, k, g) of (c, g, k), with g = 2 and k = 2ⁱ · b / 2, turns blocks of b by R (not Rᵀ, as OFT), and puts
    them back; R and its limit are those of OFT. ComfyUI and LyCORIS also blend each R with I by the strength; at strength 1 all are the same.
    """

    def __init__(self, factors: Mapping[str, Tensor], rows: int, strength: float, *, is_wide: bool) -> None:
        self._turns = _rotations_less_one(factors["blocks"], _limit(factors, rows))
        self._rescale = _rescale(factors)
        self._strength, self._is_wide = strength, is_wide

    def of(self, weights: Tensor, _: int) -> Tensor:
        """Return what is added to all rows."""
        return _by_columns(weights, self._some)

    def _some(self, weights: Tensor) -> Tensor:
        wide = weights.to(torch.float64)
        turned = wide.clone()
        count, size = self._turns.shape[1:3]
        for n, turns in enumerate(self._turns):
            order = torch.arange(len(wide)).view(-1, 2, (size // 2) << n).transpose(1, 2).reshape(-1)
            blocks = turned[order].view(count, size, -1)
            turned[order] = Multiplier(blocks, is_wide=self._is_wide).of(turns).add_(blocks).view(wide.shape)
        if self._rescale is not None:
            turned.mul_(self._rescale)
        return turned.sub_(wide).mul_(self._strength)


def _by_columns(weights: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change columns some at a time, which know nothing of each other: a large tensor would be there in float64 several times over."""
    return torch.cat([change(part) for part in torch.split(weights, _COLUMNS, 1)], 1)


def _rescale(factors: Mapping[str, Tensor]) -> Tensor | None:
    return factors["rescale"].reshape(-1, 1).to(torch.float64) if "rescale" in factors else None


def _limit(factors: Mapping[str, Tensor], rows: int) -> float:
    return float(factors["alpha"].reshape(-1)[0]) * rows if "alpha" in factors else 0.0


def _rotations_less_one(blocks: Tensor, limit: float) -> Tensor:
    """Return R - I = 2 · ((I - Q)⁻¹ - I) of each block."""
    wide = blocks.to(torch.float64)
    q = wide - wide.transpose(-1, -2)
    length = math.sqrt(row_sums((q * q).reshape(1, -1)).item()) + 1e-8
    if 0 < limit < length:
        q = q * (limit / length)
    one = torch.eye(q.shape[-1], dtype=torch.float64)
    return _inverse((one - q).flatten(0, -3)).view(q.shape).sub_(one).mul_(2)


def _inverse(matrices: Tensor) -> Tensor:
    """Invert matrices (n, k, k) by the elimination of Gauss and Jordan, in place.

    Nothing is exchanged: the symmetric half of I - Q is I, and stays at least I in what elimination leaves, so all pivots are at least 1.
    """
    for n in range(matrices.shape[-1]):
        column = matrices[:, :, n : n + 1].clone()
        pivot = column[:, n : n + 1].clone()
        row = matrices[:, n : n + 1] / pivot
        row[:, :, n : n + 1] = 1 / pivot
        matrices[:, :, n] = 0
        column[:, n] = 0
        matrices.sub_(column * row)
        matrices[:, n : n + 1] = row
    return matrices
