"""Owns number formats as torch has them: rounding to them once, and what is too large for them.

Has never heard of tensors' names, programs or methods.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["EIGHT_BITS", "LARGEST", "TORCH", "narrowed", "rounded", "saturated"]

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtypes that are computed with; all others are moved as bytes."""

EIGHT_BITS = {torch.float8_e4m3fn, torch.float8_e5m2}
LARGEST = {name: torch.finfo(dtype).max for name, dtype in TORCH.items()}
_BEYOND_E4M3 = 464.0  # half a step above the largest number; the tie goes to it, which is even
_BEYOND_F32 = (1 << 29) - 1  # the bits of a float64 that float32 has no room for
_NARROW = {torch.float16, torch.bfloat16, *EIGHT_BITS}


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to another dtype, once, to nearest even.

    torch goes from float64 to 16 and 8 bits by way of float32, which rounds twice; here that middle step rounds to odd, which is harmless
    (Boldo and Melquiond, "When double rounding is odd", 2004).
    """
    if value.dtype is torch.float64 and dtype is torch.bfloat16:  # whose smallest numbers are float32's, which have fewer bits
        near = value.to(torch.float32)
        bits = near.view(torch.int32)
        inexact = near.to(torch.float64) != value
        outwards = near.to(torch.float64).abs() > value.abs()
        value = torch.where(inexact, torch.where(outwards, bits - 1, bits) | 1, bits).view(torch.float32)
    elif value.dtype is torch.float64 and dtype in _NARROW:
        bits = value.contiguous().view(torch.int64)
        odd = bits & _BEYOND_F32
        odd.add_(_BEYOND_F32).bitwise_or_(bits).bitwise_and_(~_BEYOND_F32)  # a carry wherever a bit was lost
        value = odd.view(torch.float64).to(torch.float32)
    if dtype is torch.float8_e4m3fn and value.dtype is not dtype:  # it has no infinity, and torch makes 448 of whatever is too large
        value = torch.where(value.to(torch.float32).abs() > _BEYOND_E4M3, math.nan, value)
    return value.to(dtype)


def narrowed(value: Tensor, dtype: str, *, saturates: bool) -> Tensor:
    """Round a value to a dtype by name; what is only moved stays as it is."""
    if dtype not in TORCH:
        return value
    return rounded(saturated(value, TORCH[dtype]) if saturates else value, TORCH[dtype])


def saturated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Take the largest number of a dtype for what is larger; what is not a number stays so."""
    largest = torch.finfo(dtype).max
    if value.dtype in EIGHT_BITS or torch.finfo(value.dtype).max < largest:
        value = value.to(torch.promote_types(torch.float32, dtype) if dtype not in EIGHT_BITS else torch.float32)
    return value.clamp(-largest, largest)
