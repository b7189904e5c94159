"""Owns slices: elements of stored tensors are read, and those of several tensors put together.

Has never heard of methods or of what is computed; the slices it makes are flat.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from sdmerge_build.dtypes import ITEMSIZE, WHOLE
from sdmerge_build.errors import IntegrityError, Issue
from sdmerge_build.programs import Fit, Load, Move
from sdmerge_build.rounding import EIGHT_BITS, TORCH

__all__ = ["counted", "fitted", "moved", "read_factor", "read_slice", "widened"]

_WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_slice(files: Sequence[BinaryIO], value: Load, start: int, count: int) -> Tensor:
    """Read elements of a stored tensor; dtypes that are only moved are seen as bytes."""
    file, width = files[value.leaf], ITEMSIZE[value.dtype]
    torch_dtype = TORCH.get(value.dtype, torch.uint8)
    tensor = torch.empty(count * width // torch_dtype.itemsize, dtype=torch_dtype)
    view = memoryview((ctypes.c_ubyte * (count * width)).from_address(tensor.data_ptr())).cast("B")
    have, position = 0, value.start + start * width
    while have < len(view):
        got = _read_at(file, position + have, view[have:])
        if not got:
            raise IntegrityError(Issue(where=str(file.name), what="the file became shorter while it was being read"))
        have += got
    return tensor


def _read_at(file: BinaryIO, position: int, view: memoryview) -> int:
    """Read into memory what is at a position of a file; where the system can do that in one call, threads wait less for Python's lock."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [view], position)
    file.seek(position)
    return file.readinto(view)  # type: ignore[attr-defined, no-any-return]  # raw files have it


def read_factor(files: Sequence[BinaryIO], value: Load, shape: tuple[int, ...]) -> Tensor:
    """Read a whole factor of an adapter; whole numbers become fractions."""
    factor = read_slice(files, value, 0, value.numel)
    if value.dtype in WHOLE:
        factor = factor.view(_WHOLE[value.dtype]).to(torch.float64)
    return factor.view(shape)


def counted(start: int, count: int) -> Tensor:
    """Count on from a number, in whole numbers of 64 bits, which are only moved: as bytes."""
    return torch.arange(start, start + count, dtype=torch.int64).view(torch.uint8)


def moved(move: Move, start: int, count: int, part: Callable[[int, int, int], Tensor]) -> Tensor:
    """Put together a slice of other tensors' elements; `part` gives some of one, by its program, the first element and how many."""
    width = 1 if move.dtype in TORCH else ITEMSIZE[move.dtype]
    if move.turned:
        rows, columns = move.turned
        [run] = move.runs
        whole = part(*run).view(rows, columns, width).transpose(0, 1).reshape(-1)
        return whole[start * width : (start + count) * width]
    pieces = []
    position = 0  # of the first element of a piece
    for program, first, size in move.runs:
        low, high = max(start, position), min(start + count, position + size)
        if low < high:
            pieces.append(part(program, first + low - position, high - low))
        position += size
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def widened(arg: int, values: Mapping[int, Tensor], compute: str, wide: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
    """Give a value the dtype that arithmetic is done in; converted once for all who use it."""
    value = values[arg]
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(compute, value.dtype)
    if dtype in EIGHT_BITS:
        dtype = torch.float32  # no arithmetic is defined on eight bits
    if dtype is value.dtype:
        return value
    if (arg, dtype) not in wide:
        wide[arg, dtype] = value.to(dtype)
    return wide[arg, dtype]


def fitted(fit: Fit, values: Mapping[int, Tensor]) -> Tensor:
    """Take of a value what two shapes have in common, and the rest from another, or zeros."""
    value = values[fit.arg].view(fit.shape)
    common = tuple(slice(0, min(sizes)) for sizes in zip(fit.shape, fit.to, strict=True))
    made = value.new_zeros(fit.to) if fit.under is None else values[fit.under].view(fit.to).clone()
    made[common] = value[common]
    return made.reshape(-1)
