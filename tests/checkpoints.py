"""Miniature checkpoints: real tensor names, shrunken shapes, seeded numbers. Written with the safetensors library, not with ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import save_file

from sdmerge_build.architectures import architecture_named

DTYPES = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}


def numbers(seed: str, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Make a tensor of weights that look trained; the same for a seed and a name, whatever else is made."""
    return seeded(int.from_bytes(blake3(f"{seed}/{name}".encode()).digest(8), "little") % 2**63, shape, dtype)


def seeded(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make numbers between -1/8 and 1/8 that need all of a float16's digits."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-4096, 4097, shape, generator=generator).to(torch.float64) / 32768 * 1.01).to(dtype)


def miniature(architecture: str, seed: str, dtype: str = "F16", *, every: int = 1) -> dict[str, torch.Tensor]:
    """Make a state dict of an architecture's names; `every` thins it out, keeping the tensors it is recognised by."""
    known = architecture_named(architecture)
    tensors = {}
    for n, (name, shape) in enumerate(known.layout().items()):
        if n % every and name not in {*known.present, *known.shapes}:
            continue
        small = shape if name in known.shapes else tuple(d if d <= 4 else 4 + d % 5 * 4 for d in shape)
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(math.prod(small)).reshape(small)
        else:
            tensors[name] = numbers(seed, name, small, DTYPES[dtype])
    return tensors


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a checkpoint as other tools do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {"format": "pt"}))
    return path
