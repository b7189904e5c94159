"""Adapters' factors of every kind in miniature, and what they make of a tensor: their formulas in float64, from whole tensors."""

from __future__ import annotations

import math

import checkpoints
import torch
from torch import Tensor

from sdmerge_build.methods.changes import Loaded


def some(name: str, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Numbers of a stored factor."""
    return checkpoints.numbers("adapter", name, shape, torch.float32).to(dtype)


def loaded(kind: str, *, strength: float = 0.7, rows: tuple[int, int] | None = None, turned: bool = False, **factors: Tensor) -> Loaded:
    return Loaded(kind=kind, factors=factors, rows=rows, turned=turned, strength=strength)


def kernel(shape):
    return shape[2:]


def lora(shape, rank=4, **more):
    ones = (1,) * len(kernel(shape))
    return {"up": some("up", shape[0], rank, *ones), "down": some("down", rank, shape[1], *kernel(shape))} | more


def lora_mid(shape, rank=4, **more):
    down, mid = some("down", rank, shape[1], 1, 1), some("mid", rank, rank, *kernel(shape))
    return {"up": some("up", shape[0], rank, 1, 1), "down": down, "mid": mid} | more


def loha(shape, rank=4, **more):
    width = math.prod(shape[1:])
    sides = {f"w{n}_{side}": some(f"w{n}{side}", *size) for n in (1, 2) for side, size in (("a", (shape[0], rank)), ("b", (rank, width)))}
    return sides | more


def loha_core(shape, rank=4, **more):
    sides = {f"w{n}_{side}": some(f"w{n}{side}", rank, size) for n in (1, 2) for side, size in (("a", shape[0]), ("b", shape[1]))}
    return sides | {f"t{n}": some(f"t{n}", rank, rank, *kernel(shape)) for n in (1, 2)} | more


def lokr(shape, *, one="full", other="full", rank=3, split=(4, 5), **more):
    (a, c), (b, d) = split, (shape[0] // split[0], shape[1] // split[1])
    factors = {"w1": some("w1", a, c)} if one == "full" else {"w1_a": some("w1a", a, rank), "w1_b": some("w1b", rank, c)}
    match other:
        case "full":
            factors |= {"w2": some("w2", b, d, *kernel(shape))}
        case "flat":
            factors |= {"w2_a": some("w2a", b, rank), "w2_b": some("w2b", rank, d * math.prod(kernel(shape)))}
        case "core":
            factors |= {"w2_a": some("w2a", rank, b), "w2_b": some("w2b", rank, d), "t2": some("t2", rank, rank, *kernel(shape))}
    return factors | more


def glora(shape, rank=4, *, old=False, **more):
    ones = (1,) * len(kernel(shape))
    sizes = {"a1": (shape[1], rank, *ones), "a2": (rank, shape[1], *ones), "b1": (shape[0], rank, *ones), "b2": (rank, shape[1], *kernel(shape))}
    if old:
        sizes = {"a1": sizes["a2"], "a2": sizes["a1"], "b1": sizes["b2"], "b2": sizes["b1"]}
    return {role: some(role, *size) for role, size in sizes.items()} | more


def wide(factors):
    return {role: factor.double() for role, factor in factors.items()}


def scale_of(f, rank):
    return f["alpha"].item() / rank if "alpha" in f else 1.0


def kron_of(f, shape):
    one = f.get("w1", f["w1_a"] @ f["w1_b"] if "w1_a" in f else None)
    other = f["w2"] if "w2" in f else torch.einsum("ijkl,ip,jr->prkl", f["t2"], f["w2_a"], f["w2_b"]) if "t2" in f else f["w2_a"] @ f["w2_b"]
    if other.dim() == 4:
        one = one[:, :, None, None]
    rank = len(f["w2_b"]) if "w2_b" in f else len(f["w1_b"]) if "w1_b" in f else None
    return torch.kron(one, other.contiguous()).reshape(shape) * (1 if rank is None else scale_of(f, rank))


def delta(kind, factors, w):
    """What the kinds that add do at strength 1, from whole tensors."""
    f, shape = wide(factors), w.shape
    match kind:
        case "lora" if "mid" in f:
            return torch.einsum("im,mn...,nj->ij...", f["up"].flatten(1), f["mid"], f["down"].flatten(1)) * scale_of(f, len(f["down"]))
        case "lora":
            return torch.einsum("ir,rj->ij", f["up"].flatten(1), f["down"].flatten(1)).view(shape) * scale_of(f, len(f["down"]))
        case "loha":
            made = [
                torch.einsum("ij...,ip,jr->pr...", f[f"t{n}"], f[f"w{n}_a"], f[f"w{n}_b"]) if "t1" in f else f[f"w{n}_a"] @ f[f"w{n}_b"]
                for n in (1, 2)
            ]
            return (made[0] * made[1]).view(shape) * scale_of(f, len(f["w1_b"]))
        case "lokr":
            return kron_of(f, shape)
        case "glora":
            a1, a2, b1, b2 = (f[role].flatten(1) for role in ("a1", "a2", "b1", "b2"))
            if a1.shape[0] != shape[1]:
                a1, a2, b1, b2 = a2, a1, b2, b1
            return (torch.einsum("oi...,ij->oj...", w, a1 @ a2) + (b1 @ b2).view(shape)) * scale_of(f, len(a2))
        case "ia3":
            along = (1, -1) if f.get("on_input", torch.zeros(1)).item() else (-1, 1)
            return w * f["weight"].reshape(*along, *[1] * (w.dim() - 2))
        case "diff":
            return f["diff"].view(shape)
    raise AssertionError(kind)


def rotations(f, rows):
    q = f["blocks"] - f["blocks"].mT
    limit = f["alpha"].item() * rows if "alpha" in f else 0
    length = q.norm().item() + 1e-8
    if 0 < limit < length:
        q = q * limit / length
    one = torch.eye(q.shape[-1], dtype=torch.float64)
    return (one + q) @ torch.linalg.inv(one - q)


def turned_by(kind, factors, w):
    f, rows = wide(factors), len(w)
    r = rotations(f, rows)
    if kind == "oft":
        x = torch.block_diag(*r).mT @ w.flatten(1)
    else:
        x = w.flatten(1)
        for n, blocks in enumerate(r):
            k = 2**n * r.shape[-1] // 2
            order = [c * 2 * k + g * k + i for c in range(rows // (2 * k)) for i in range(k) for g in range(2)]
            shuffle = torch.eye(rows, dtype=torch.float64)[order]
            x = shuffle.mT @ torch.block_diag(*blocks) @ shuffle @ x
    if "rescale" in f:
        x = x * f["rescale"].reshape(-1, 1)
    return x.view(w.shape)


def oracle(w, change, epsilon=None):
    """What one change makes of a tensor, in float64."""
    epsilon = epsilon or torch.finfo(w.dtype).eps
    w = w.double()
    if change.rows is not None:
        first, count = change.rows
        part = oracle(w[first : first + count], loaded(change.kind, strength=change.strength, turned=change.turned, **change.factors), epsilon)
        return torch.cat([w[:first], part, w[first + count :]])
    if change.turned:
        return oracle(w.mT, loaded(change.kind, strength=change.strength, **change.factors), epsilon).mT
    if change.kind in {"oft", "boft"}:
        return w + change.strength * (turned_by(change.kind, change.factors, w) - w)
    if change.kind == "set":
        return w + change.strength * (change.factors["weight"].double() - w)
    added = delta(change.kind, change.factors, w)
    if "dora_scale" in change.factors:
        m = change.factors["dora_scale"].double()
        on_output = m.shape[0] == w.shape[0]
        others = tuple(range(1, w.dim())) if on_output else (0, *range(2, w.dim()))
        lengths = (w + added).square().sum(others, keepdim=True).sqrt() + epsilon
        return w + change.strength * ((w + added) * (m.view(lengths.shape) / lengths) - w)
    return w + change.strength * added
