"""Owns stand-ins: files in the real layout of an architecture, filled with seeded numbers, for rehearsals, tests and benchmarks.

Has never heard of methods or the store. The same seed gives the same bytes on every machine: numbers are the output of blake3, masked.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from blake3 import blake3

from sdmerge_build.adapters.writing import modules_of
from sdmerge_build.architectures import Architecture, architecture_named
from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.files import as_space_error, replacing
from sdmerge_build.recipe import SourceTable
from sdmerge_build.tensorfile import Layout, Spec, lay_out

__all__ = ["SIZES", "stand_in", "stand_in_adapter", "stand_ins"]

SIZES = ("tiny", "full")
_SHRINK = 40  # tiny models have a fortieth of every dimension, and real names
_RANKS = {"tiny": 4, "full": 32}
_ALPHA = 4.0
_ADAPTED = (".attn", ".self_attn.", ".ff.", ".mlp", "_attn.", "_mlp.", ".SelfAttention.", "linear1.", "linear2.")  # words in names of layers
_CHUNK = 256 << 10  # fits the cache with its copies

# Random bits become numbers of either sign with magnitudes from 2^-7 up to 2^-3, as trained weights have: the sign, the two lowest
# exponent bits and the mantissa stay random, the rest of the exponent is fixed.
_FLOAT_BITS = {"F16": (0x8FFF, 0x2000, 2), "F32": (0x81FFFFFF, 0x3C000000, 4)}


def stand_ins(
    architecture: Architecture, sources: Mapping[str, SourceTable], adapters: Collection[str], size: str, folder: Path
) -> dict[str, SourceTable]:
    """Replace every source by a stand-in file below `folder`, made if it is not there yet; those that are `adapters` by a LoRA."""
    replaced = {}
    for name, source in sources.items():
        variant = architecture_named(source.architecture) if source.architecture else architecture
        kind = "-".join(filter(None, (variant.name, variant.variant, "lora" if name in adapters else "", size)))
        path = folder / f"{_file_name(name)}-{kind}-{source.size or 0}.safetensors"
        if not path.exists():
            if name in adapters:
                stand_in_adapter(path, variant, size, seed=name)
            else:
                stand_in(path, variant, size, seed=name, file_size=source.size)
        keep = source.model_dump(include={"license", "credit", "homepage", "permissions", "evidence", "architecture"})
        replaced[name] = SourceTable(path=str(path.resolve()), **keep)
    return replaced


def _file_name(name: str) -> str:
    """Make a file name of a source's name: that of another recipe's source holds that recipe's path."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return name if safe == name else f"{safe.lstrip('.-')[-100:]}-{blake3(name.encode()).hexdigest()[:8]}"


def stand_in(path: Path, architecture: Architecture, size: str, *, seed: str, file_size: int | None = None) -> None:
    """Write one stand-in checkpoint.

    `size` is `tiny` or `full`. `file_size` is the real file's size in bytes, if known: where it is more than float16 needs, as many
    tensors as it takes are float32, as in real files of mixed dtypes.
    """
    _write(path, _layout(architecture, size, file_size), seed)


def stand_in_adapter(path: Path, architecture: Architecture, size: str, *, seed: str, rank: int | None = None) -> None:
    """Write one stand-in LoRA, in kohya's names, for the attention and feed-forward layers of the diffusion model and the text encoders.

    `rank` is 4 in tiny ones and 32 in full ones unless said. A family whose layers have no names in adapters gets an empty file.
    """
    specs: list[Spec] = []
    for name, shape in architecture.layout().items():
        if len(shape) == 2 and any(word in name for word in _ADAPTED):
            seen = shape if size == "full" else tuple(_shrunk(n) for n in shape)
            specs += (spec for module in modules_of(name, seen, architecture) for spec in module.specs(rank or _RANKS[size], "F16"))
    _write(path, lay_out(specs, {"ss_network_module": "networks.lora", "sdbuild.standin": size}), seed)


def _write(path: Path, layout: Layout, seed: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with as_space_error(path.parent, layout.size), replacing(path) as file:
        file.write(layout.header)
        for spec in layout.specs:
            for chunk in _content(spec, seed):
                file.write(chunk)


def _layout(architecture: Architecture, size: str, file_size: int | None) -> Layout:
    shapes = architecture.layout()
    parameters = sum(math.prod(shape) for shape in shapes.values())
    wide = max(0, (file_size or 0) - 2 * parameters) / (2 * parameters)  # share of parameters that must be float32
    specs = []
    seen = widened = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        seen += count
        is_wide = wide > 0.01 and widened + count / 2 <= wide * seen
        widened += count if is_wide else 0
        dtype = "I64" if name.endswith("position_ids") else "F32" if is_wide else "F16"
        is_whole = size == "full" or name in architecture.shapes  # a shape by which a variant is recognised
        specs.append(Spec(name, dtype, shape if is_whole else tuple(_shrunk(n) for n in shape)))
    return lay_out(specs, {"format": "pt", "sdbuild.standin": size})


def _shrunk(dimension: int) -> int:
    return dimension if dimension <= 4 else math.ceil(dimension / _SHRINK)


def _content(spec: Spec, seed: str) -> Iterator[bytes]:
    """Make a tensor's bytes, chunk by chunk: a function of the seed, its name and the position alone."""
    if spec.name.endswith(".alpha"):
        yield struct.pack("<f", _ALPHA)
        return
    if spec.dtype == "I64":
        yield b"".join(n.to_bytes(8, "little") for n in range(spec.numel))
        return
    mask, fixed, width = _FLOAT_BITS[spec.dtype]
    stream = blake3(f"sdbuild stand-in 1\0{seed}\0{spec.name}".encode())
    for start in range(0, spec.nbytes, _CHUNK):
        length = min(_CHUNK, spec.nbytes - start)
        bits = int.from_bytes(stream.digest(length=length, seek=start), "little")
        bits = bits & _repeated(mask, width, length) | _repeated(fixed, width, length)
        yield bits.to_bytes(length, "little")


def _repeated(pattern: int, width: int, length: int, _cache: dict[tuple[int, int], int] = {}) -> int:  # noqa: B006
    """Repeat a bit pattern over `length` bytes, as one long number."""
    if (pattern, length) not in _cache:
        if len(_cache) > 64:
            _cache.clear()
        _cache[pattern, length] = int.from_bytes(pattern.to_bytes(width, "little") * (length // width), "little")
    return _cache[pattern, length]


assert all(ITEMSIZE[dtype] == width for dtype, (_, _, width) in _FLOAT_BITS.items())
