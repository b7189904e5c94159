"""Owns what the kinds of adapters add to a tensor, row by row: LoRA, LoHa, LoKr, GLoRA, IA³ and plain differences.

Has never heard of files, recipes or decompositions. A delta is prepared once per tensor, and is asked for the rows of slices: (n, width) in float64,
to be rounded once. In all formulas s is the strength, and a = alpha / rank, or 1 where there is no alpha.

Facts: ComfyUI `comfy/weight_adapter/`, LyCORIS `lycoris/functional/`, kohya-ss `networks/merge_lora.py`, AUTOMATIC1111 `extensions-builtin/Lora/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from sdmerge_build.methods.products import Multiplier, exponents, powers

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["Delta", "LowRank", "Pair", "delta_of", "number", "pair_of"]

Factors = Mapping[str, "Tensor"]
Shape = tuple[int, ...]
Pair = tuple["Tensor", "Tensor", float]  # up (rows, rank), down (rank, width), and the number that their product is multiplied with


class Delta(Protocol):
    """What is added to the rows of a tensor."""

    def of(self, weights: Tensor, first: int) -> Tensor:
        """Return what is added to rows (n, width) that begin at row `first`; the rows themselves matter to some."""


def delta_of(kind: str, factors: Factors, shape: Shape, strength: float, *, is_wide: bool) -> Delta:
    """Prepare a change of this kind for a tensor of this shape, as strong as `strength`; `is_wide` asks for the precision of float64."""
    match kind:
        case "lora":
            return LowRank([pair_of(factors, strength)], is_wide=is_wide)
        case "loha":
            return _Hadamard(factors, strength, is_wide=is_wide)
        case "lokr":
            return _Kronecker(factors, strength, is_wide=is_wide)
        case "glora":
            return _Generalized(factors, shape, strength, is_wide=is_wide)
        case "ia3":
            return _Stretched(factors, shape, strength)
        case "diff":
            return _Difference(factors["diff"], strength)
    message = f"BUG: no changes of kind {kind}"
    raise AssertionError(message)


def number(factors: Factors, role: str, default: float) -> float:
    """Return a factor that is one number."""
    return float(factors[role].reshape(-1)[0]) if role in factors else default


def pair_of(factors: Factors, strength: float) -> Pair:
    """Return the two matrices of a LoRA: `s · a · up · down`.

    A convolution of k × k has a `down` of k × k, or a `down` of 1 × 1 and a `mid` of k × k between the two (LoCon, "CP"), which is contracted with
    `down` first: Σₙ mid[m, n, …] down[n, j]. The rank of a is that of `down` as it is stored.
    """
    up, down = factors["up"].flatten(1), factors["down"].flatten(1)
    scale = strength * (number(factors, "alpha", len(down)) / max(1, len(down)))
    return up, _contracted(factors["mid"], down) if "mid" in factors else down, scale


class LowRank:
    """A sum of products of two narrow matrices; many cost one multiplication: `[s₁a₁up₁ | s₂a₂up₂ …] @ [down₁; down₂; …]`.

    Columns of up and rows of down are scaled by powers of two, so that both are as large as each other: rounded beside those of another LoRA,
    they then lose no more than their part in the sum allows, however a trainer divided its size between the two.
    """

    def __init__(self, pairs: Sequence[Pair], *, is_wide: bool) -> None:
        self._ups = [up for up, _, _ in pairs]
        stacked = torch.empty(sum(len(down) for _, down, _ in pairs), pairs[0][1].shape[1], dtype=torch.float64)
        scales, position = [], 0
        for up, stored, scale in pairs:
            down = stacked[position : position + len(stored)].copy_(stored)
            shift = _balance(up, down, scale)
            down.mul_(powers(shift.neg()).unsqueeze(1))
            scales.append(powers(shift).mul_(scale))
            position += len(stored)
        self._scales = torch.cat(scales)
        self._down = Multiplier(stacked, is_wide=is_wide)

    def __len__(self) -> int:
        return len(self._ups[0])

    def of(self, weights: Tensor, first: int) -> Tensor:
        """Return the rows."""
        return self.at(slice(first, first + len(weights)))

    def at(self, rows: slice | Tensor) -> Tensor:
        """Return any rows."""
        up = torch.cat([up[rows].to(torch.float64) for up in self._ups], 1)
        return self._down.of(up.mul_(self._scales))


def _balance(up: Tensor, down: Tensor, scale: float) -> Tensor:
    """Return by which powers of two columns of up are multiplied, and rows of down divided."""
    if not up.numel() or not down.numel():
        return torch.zeros(len(down), dtype=torch.int64)
    above = exponents(torch.maximum(up.amax(0), up.amin(0).neg()).to(torch.float64).mul_(abs(scale)))
    return exponents(torch.maximum(down.amax(1), down.amin(1).neg())).sub_(above).bitwise_right_shift_(1).clamp_(-500, 500)


def _contracted(core: Tensor, side: Tensor) -> Tensor:
    """Return Σₙ core[m, n, …] side[n, j] as (m, j · …), in float64."""
    flat = core.flatten(2) if core.dim() > 2 else core.unsqueeze(2)
    rank, _, kernel = flat.shape
    found = Multiplier(side, is_wide=True).of(flat.transpose(1, 2).reshape(rank * kernel, -1))
    return found.view(rank, kernel, -1).transpose(1, 2).reshape(rank, -1)


def _side(factors: Factors, name: str, core: str, scale: float, *, is_wide: bool) -> LowRank:
    """Prepare `a · b`, or a core of convolutions with both its sides: Σᵢⱼ core[i, j, …] a[i, p] b[j, r]."""
    a, b = factors[f"{name}_a"].flatten(1), factors[f"{name}_b"].flatten(1)
    pair = (a.t(), _contracted(factors[core], b), scale) if core in factors else (a, b, scale)
    return LowRank([pair], is_wide=is_wide)


class _Hadamard:
    """LoHa: `s · a · (w1_a · w1_b) ⊙ (w2_a · w2_b)`; with `t1` and `t2`, each of the two is a core with both its sides.

    N. Hyeon-Woo, M. Ye-Bin, T.-H. Oh, "FedPara" (2021). The rank of a is that of `w1_b`.
    """

    def __init__(self, factors: Factors, strength: float, *, is_wide: bool) -> None:
        rank = len(factors["w1_b"])
        scale = strength * (number(factors, "alpha", rank) / max(1, rank))
        self._one = _side(factors, "w1", "t1", scale, is_wide=is_wide)
        self._other = _side(factors, "w2", "t2", 1.0, is_wide=is_wide)

    def of(self, weights: Tensor, first: int) -> Tensor:
        return self._one.of(weights, first).mul_(self._other.of(weights, first))


class _Kronecker:
    """LoKr: `s · a · (w1 ⊗ w2)`, each of them whole or `w_a · w_b`; `t2` is a core with `w2_a` and `w2_b` as its sides.

    a has the rank of `w2_b`, else that of `w1_b`; it is 1 where both are whole (ComfyUI, LyCORIS).
    """

    def __init__(self, factors: Factors, strength: float, *, is_wide: bool) -> None:
        factored = [factors[name] for name in ("w2_b", "w1_b") if name in factors]
        rank = len(factored[0]) if factored else 1
        scale = strength * (number(factors, "alpha", rank) / max(1, rank)) if factored else strength
        self._one = self._whole(factors, "w1") if "w1" in factors else _side(factors, "w1", "", 1.0, is_wide=True).at(slice(None))
        self._one = self._one * scale
        self._other = self._whole(factors, "w2") if "w2" in factors else _side(factors, "w2", "t2", 1.0, is_wide=is_wide)

    @staticmethod
    def _whole(factors: Factors, name: str) -> Tensor:
        return factors[name].flatten(1).to(torch.float64)

    def of(self, weights: Tensor, first: int) -> Tensor:
        height = len(self._other)
        index = torch.arange(first, first + len(weights))
        one, lower = self._one[index // height], index % height
        if not isinstance(self._other, LowRank):
            other = self._other[lower]
        elif len(lower) < height:
            other = self._other.at(lower)
        else:
            other = self._other.at(slice(None))[lower]
        return (one.unsqueeze(2) * other.unsqueeze(1)).flatten(1)


class _Generalized:
    """GLoRA: `s · a · (W · a1 · a2 + b1 · b2)`, where W is multiplied along its second dimension.

    Files of older LyCORIS have all four the other way round: `s · a · (W · a2 · a1 + b2 · b1)`. They are recognised by shapes, as ComfyUI does: where
    both readings fit, as they do with every square tensor, it is the older one if `a2` is as high as the tensor.
    A. Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning" (2023).
    """

    def __init__(self, factors: Factors, shape: Shape, strength: float, *, is_wide: bool) -> None:
        a1, a2, b1, b2 = (factors[role].flatten(1) for role in ("a1", "a2", "b1", "b2"))
        if _is_old([factors[role] for role in ("a1", "a2", "b1", "b2")], shape):
            a1, a2, b1, b2 = a2, a1, b2, b1
        rank = len(a2)
        self._scale = strength * (number(factors, "alpha", rank) / max(1, rank))
        self._into, self._back = Multiplier(a1, is_wide=is_wide), Multiplier(a2, is_wide=is_wide)
        self._added = LowRank([(b1, b2, self._scale)], is_wide=is_wide)
        self._channels = shape[1] if len(shape) > 1 else 1

    def of(self, weights: Tensor, first: int) -> Tensor:
        channels = weights.reshape(len(weights), self._channels, -1).transpose(1, 2)
        turned = self._back.of(self._into.of(channels.reshape(-1, self._channels)))
        turned = turned.view(channels.shape).transpose(1, 2).reshape(weights.shape)
        return turned.mul(self._scale).add_(self._added.of(weights, first))


def _is_old(factors: Sequence[Tensor], shape: Shape) -> bool:
    a1, a2, b1, b2 = (factor.shape for factor in factors)
    is_old = b2[1] == b1[0] == a1[0] == a2[1]
    is_new = b2[0] == b1[1] == a1[1] == a2[0]
    return is_old and (not is_new or (len(shape) > 1 and a2[0] == shape[0] == shape[1]))


class _Stretched:
    """IA³: `s · w ⊙ W`, where w has a number for each row, or for each entry of the second dimension where `on_input` is 1.

    H. Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (2022).
    """

    def __init__(self, factors: Factors, shape: Shape, strength: float) -> None:
        factor = factors["weight"].reshape(-1).to(torch.float64) * strength
        self._is_on_input = bool(number(factors, "on_input", 0))
        self._factor = factor.repeat_interleave(math.prod(shape[2:])) if self._is_on_input else factor.unsqueeze(1)

    def of(self, weights: Tensor, first: int) -> Tensor:
        return weights.to(torch.float64) * (self._factor if self._is_on_input else self._factor[first : first + len(weights)])


class _Difference:
    """A plain difference: `s · diff`."""

    def __init__(self, diff: Tensor, strength: float) -> None:
        self._diff, self._strength = diff, strength

    def of(self, weights: Tensor, first: int) -> Tensor:
        diff = self._diff.reshape(-1, weights.shape[1])[first : first + len(weights)]
        return diff.to(torch.float64) * self._strength
