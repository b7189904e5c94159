"""Owns rotations between matrices: the orthogonal one that best turns one's rows into another's, and any power of it.

Has never heard of recipes. Rows are turned from the right: `x @ q`. Everything is float64; LAPACK differs from CPU to CPU, so methods are `pinned`.

Best rotation: P. H. Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["rotated"]


def rotated(a: Tensor, b: Tensor, alignment: float, alpha: float, centralization: float) -> Tensor:
    """Turn the rows of a matrix, a linear weight or filters towards those of another."""
    if torch.equal(a, b) or not a.numel():
        return a
    if not torch.isfinite(a + b).all():
        return a + b  # is not finite either, and is complained of by name; LAPACK would refuse it
    is_filters = a.dim() == 4 and a.shape[2] * a.shape[3] != 1
    shape = (-1, math.prod(a.shape[2:])) if is_filters else (a.shape[0], -1)
    rows, others = a.reshape(shape).double(), b.reshape(shape).double()
    mean, other_mean = rows.mean(0) * centralization, others.mean(0) * centralization
    rows, others = rows - mean, others - other_mean
    basis = _joint_basis(rows, others)
    if basis is not None:
        rows, others = rows @ basis, others @ basis
    q = _best_rotation(rows, others, is_proper=alignment != round(alignment))
    if alpha != 0:
        rows = rows * (1 - alpha) + (others @ q.T) * alpha
    rows = _turned(rows, q, alignment)
    if basis is not None:
        rows = rows @ basis.T
    rows += mean * (1 - alignment) + other_mean * alignment
    return rows.reshape(a.shape)


def _joint_basis(a: Tensor, b: Tensor) -> Tensor | None:
    """Return an orthonormal basis, as columns, of a space that holds all rows; None where that is no smaller than the whole."""
    if 2 * a.shape[0] >= a.shape[1]:
        return None
    basis: Tensor = torch.linalg.qr(torch.cat((a, b)).T).Q
    return basis


def _best_rotation(a: Tensor, b: Tensor, *, is_proper: bool) -> Tensor:
    """Return the orthogonal q that brings `a @ q` nearest to `b`; a proper one turns, but does not reflect.

    What `a` and `b` leave undecided, as they have too few or dependent rows, is as near to no rotation as can be.
    """
    u, s, v = _singular(a, b)
    rank = int(s.gt(s.amax() * len(u) * torch.finfo(s.dtype).eps).count_nonzero())
    if rank < len(u):
        x, _, y = torch.linalg.svd(u[:, rank:].T @ v[:, rank:])
        u, v = torch.cat((u[:, :rank], u[:, rank:] @ x), 1), torch.cat((v[:, :rank], v[:, rank:] @ y.T), 1)
    q = u @ v.T
    if is_proper and torch.linalg.slogdet(q).sign < 0:
        q -= 2 * torch.outer(u[:, -1], v[:, -1])  # the direction that matters least
    return q


def _singular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose `a.T @ b` into `u @ diag(s) @ v.T`, with square u and v; of few rows by way of a matrix no larger than their number."""
    if a.shape[0] >= a.shape[1]:
        u, s, v = torch.linalg.svd(a.T @ b)
        return u, s, v.T
    n = a.shape[0]
    (u, below), (v, beside) = (torch.linalg.qr(x.T, mode="complete") for x in (a, b))
    inner_u, s, inner_v = torch.linalg.svd(below[:n] @ beside[:n].T)
    return torch.cat((u[:, :n] @ inner_u, u[:, n:]), 1), s, torch.cat((v[:, :n] @ inner_v.T, v[:, n:]), 1)


def _turned(x: Tensor, q: Tensor, power: float) -> Tensor:
    """Return `x @ q ** power`.

    q turns by an angle in each of many planes. These belong to the symmetric half of q, whose eigenvalues are the cosines; the other half, applied
    to a vector of a plane, gives the one perpendicular to it, times the sine. A half turn has no direction: its fractions only shrink.
    """
    if power in {0, 1}:
        return x @ q if power else x
    if power == -1:
        return x @ q.T
    cosines, planes = torch.linalg.eigh((q + q.T) / 2)
    across: Tensor = (q - q.T) / 2 @ planes
    sines = across.norm(dim=0)
    angles: Tensor = torch.atan2(sines, cosines) * power
    across *= angles.sin().div_(sines).where(sines > 1e-7, 0.0)
    turned: Tensor = ((x @ planes) * angles.cos() + x @ across) @ planes.T
    return turned
