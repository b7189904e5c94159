"""Owns the methods that see a tensor as a matrix, and keep part of its rank.

Has never heard of slices: a decomposition needs the tensor in one piece. LAPACK's last bits differ from CPU to CPU, so all are `pinned`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmerge_build.methods import Positive, Ratio, method
from sdmerge_build.methods.consensus import kept_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from sdmerge_build.methods.late import torch

__all__ = ["truncate_rank"]


@method(version=1, cut="nowhere", pinned=True)
def truncate_rank(base: Tensor, a: Tensor, /, *, rank: Positive, scale: Ratio = 1.0) -> Tensor:
    """Keep of a difference what a matrix of lower rank can hold, as a LoRA would: `base + scale * best approximation of a - base`.

    rank: below 1, a share of the full rank, but at least one; from 1 on, how many singular values are kept. Tensors are seen as (entries of the first
        dimension, all else).
    scale: the factor of what is added.

    Origin: sd-mecha `truncate_rank`; C. Eckart and G. Young, "The approximation of one matrix by another of lower rank" (1936).
    Elsewhere: kohya `extract_lora_from_models.py`, whose result is the matrices themselves. sd-mecha starts from random numbers, unseeded unless
        it is told; here the decomposition is complete, in float64.
    """
    rows = a.shape[0] if a.dim() else 1
    full = min(rows, a.numel() // max(1, rows))
    if rank == 0 or scale == 0 or not full:
        return base
    kept = kept_count(rank, full) if rank < 1 else min(full, int(rank))
    if kept == full and scale == 1:
        return a
    delta = (a - base).to(torch.float64).reshape(rows, -1)
    if kept < full and torch.isfinite(delta).all():  # LAPACK refuses what is not, and the engine complains of it by name
        delta = _truncated(delta, kept) if rows <= delta.shape[1] else _truncated(delta.t(), kept).t()
    return base + delta.mul_(scale).to(base.dtype).view(base.shape)


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    """Project a wide matrix onto its leading left singular vectors: the eigenvectors of its small square, a fraction of the work of a full SVD."""
    _, vectors = torch.linalg.eigh(matrix @ matrix.t())
    leading: Tensor = vectors[:, -rank:]
    return leading @ (leading.t() @ matrix)
