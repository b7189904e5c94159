"""Owns the safetensors format: reading a header with suspicion, laying out a file to be written.

Has never heard of recipes, models or arithmetic; it deals in names, dtypes, shapes, offsets and bytes.
Rules: the format's README and `tensor.rs` of huggingface/safetensors, plus what they leave to the reader (duplicate keys, names).
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.errors import IntegrityError, Issue

__all__ = ["Header", "Layout", "Spec", "file_order", "header_length", "lay_out", "parse_header", "read_header", "read_number"]

MAX_HEADER = 50_000_000  # bytes; half of the reference reader's cap, a hundred times the largest real header
MAX_FOREIGN = 16 << 20  # bytes of a header that is not plain ASCII, which takes four times its size in memory
MAX_TENSORS = 50_000  # twenty times the largest real checkpoint
MAX_FIELDS = 500_000  # a hundred times the largest real checkpoint; keeps a hostile header from filling memory
MAX_NAME = 1024
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST_COMPLAINTS = 5
_NUMBERS = {"F64": "<d", "F32": "<f", "BF16": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}  # as `struct` calls them
_HALF = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, UTF-8 cannot


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor's name, safetensors dtype and shape; `offset` counts from the start of the data section, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        """Count the elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Count the bytes."""
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of itself, believed only after every offset has been checked against its size."""

    tensors: Mapping[str, Spec]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A file to be written: its encoded header, and its tensors in file order with their offsets."""

    header: bytes
    specs: tuple[Spec, ...]

    @property
    def size(self) -> int:
        """Return the size of the whole file in bytes."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def file_order(spec: Spec) -> tuple[bool, int, str]:
    """Order tensors so that each lies on a multiple of its own width and the order hardly depends on dtypes.

    Tensors of a multiple of eight elements keep any dtype aligned, so they come first, by name alone: artifacts of different
    dtypes then share one order, and one pass can write and hash them all from front to back. The few others follow, wide dtypes first.
    """
    ragged = spec.numel % 8 != 0
    return ragged, -ITEMSIZE[spec.dtype] if ragged else 0, spec.name


def lay_out(specs: Iterable[Spec], metadata: Mapping[str, str]) -> Layout:
    """Lay a file out: the same bytes for the same tensors and metadata, in whatever order they are given."""
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    placed: list[Spec] = []
    offset = 0
    for spec in sorted(specs, key=file_order):
        here = Spec(spec.name, spec.dtype, spec.shape, offset)
        end = offset + here.nbytes
        table[here.name] = {"dtype": here.dtype, "shape": list(here.shape), "data_offsets": [offset, end]}
        placed.append(here)
        offset = end
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return Layout(header=len(raw).to_bytes(8, "little") + raw, specs=tuple(placed))


def read_header(path: Path) -> Header:
    """Read and check a file's header, a few hundred kilobytes, without touching its data.

    Raises `IntegrityError` with every complaint found, each naming the tensor at fault, and `OSError` when the file cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise _refusal(str(path), "is not a regular file")
    with path.open("rb") as file:
        file_size = file.seek(0, 2)
        file.seek(0)
        start = file.read(16)
        length = header_length(start, file_size, str(path))
        file.seek(8)
        raw = file.read(length)
    return parse_header(raw, file_size, str(path))


def read_number(path: Path, header: Header, name: str) -> float:
    """Read a tensor of one number, such as an adapter's alpha; NaN where it is no number of a common dtype."""
    spec = header.tensors[name]
    if spec.numel != 1 or spec.dtype not in _NUMBERS:
        return math.nan
    with path.open("rb") as file:
        file.seek(header.data_start + spec.offset)
        raw = file.read(spec.nbytes)
    if spec.dtype == "BF16":
        raw = b"\0\0" + raw  # the upper half of a float32
    return float(struct.unpack(_NUMBERS[spec.dtype], raw)[0])


def header_length(start: bytes, file_size: int, where: str) -> int:
    """Read the length of a header from the first sixteen bytes of a file. Raises `IntegrityError` when it cannot be believed."""
    length = int.from_bytes(start[:8], "little")
    if complaint := _bad_length(start, length, file_size):
        raise _refusal(where, complaint, hint=_other_format(start))
    return length


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check a header's text, which begins at byte 8 of a file of `file_size` bytes. Raises `IntegrityError` with every complaint found."""
    try:
        table = _parse(raw)
        metadata = _metadata(table.pop("__metadata__", {}))
    except _HeaderError as error:
        raise _refusal(where, str(error)) from error
    complaints: list[str] = []
    tensors = {name: spec for name, entry in table.items() if (spec := _spec(name, entry, complaints))}
    complaints = complaints or _bad_offsets(tensors, file_size - 8 - len(raw))
    if complaints:
        raise _refusal(where, *complaints[:_MOST_COMPLAINTS])
    return Header(tensors=tensors, metadata=metadata, data_start=8 + len(raw), file_size=file_size)


class _HeaderError(ValueError):
    """The header's text is not what the format allows."""


def _refusal(where: str, *complaints: str, hint: str = "") -> IntegrityError:
    return IntegrityError(*(Issue(where=where, what=complaint, hint=hint) for complaint in complaints))


def _bad_length(start: bytes, length: int, file_size: int) -> str:
    if len(start) < 8:
        return f"the file has {file_size} bytes, too few for a safetensors file"
    if length > MAX_HEADER:
        return f"the header claims {length} bytes; no more than {MAX_HEADER} are read"
    if 8 + length > file_size:
        return f"the header claims {length} bytes, but the file has {file_size}: it is truncated"
    if length < 2:
        return f"the header claims {length} bytes; the shortest has 2"
    return ""


def _other_format(start: bytes) -> str:
    """Guess what a file without a believable header is."""
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "it looks like a .ckpt; convert it to safetensors first"
    if start.lstrip().lower().startswith((b"<!doc", b"<html")):
        return "it is a web page, probably a login page saved in place of the model"
    if start.startswith(b"version https"):
        return "it is a Git LFS pointer; fetch the file that it stands for"
    return "is it a safetensors file, and is the download complete?"


def _parse(raw: bytes) -> dict[str, Any]:
    """Parse the header's JSON; duplicate keys, which JSON parsers drop in silence, are refused."""
    if not raw.startswith(b"{"):
        raise _HeaderError("the header does not begin with `{`")
    if len(raw) > MAX_FOREIGN and not raw.isascii():
        raise _HeaderError(f"the header is not plain ASCII, and has {len(raw)} bytes; no more than {MAX_FOREIGN} of that are read")
    if raw.count(b":") > MAX_FIELDS or raw.count(b",") > 2 * MAX_FIELDS:
        raise _HeaderError(f"the header has more than {MAX_FIELDS} fields; no checkpoint has")
    try:
        table = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)  # left to itself, `json` guesses UTF-16
    except _HeaderError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of more than 4300 digits
        raise _HeaderError(f"the header is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise _HeaderError("the header is not a table")
    if len(table) > MAX_TENSORS:
        raise _HeaderError(f"the header lists {len(table)} tensors; no more than {MAX_TENSORS} are read")
    return table


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _HeaderError(f"the header names `{_shown(twice)}` twice")
    return table


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _HeaderError("`__metadata__` is not a table")
    for key, text in value.items():
        if not isinstance(text, str) or _HALF.search(key) or _HALF.search(text):
            raise _HeaderError(f"`__metadata__` holds `{_shown(key)}`, which is not text")
    return value


def _shown(name: str) -> str:
    """Make a hostile name safe to print."""
    return name[:80].encode("unicode_escape").decode() + ("…" if len(name) > 80 else "")


def _spec(name: str, entry: Any, complaints: list[str]) -> Spec | None:
    """Read one tensor's entry, or say what is wrong with it."""

    def complain(what: str) -> None:
        complaints.append(f"tensor `{_shown(name)}` {what}")

    if not name or len(name) > MAX_NAME or not name.isprintable():
        return complain(f"has a name that is empty, longer than {MAX_NAME}, or not printable")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_FIELDS:
        return complain("must have exactly `dtype`, `shape` and `data_offsets`")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        return complain(f"has dtype `{_shown(str(dtype))}`, which is not known")
    if not _are_sizes(shape) or len(shape) > 32:
        return complain("has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        return complain("has offsets that are not two positions")
    if math.prod(size for size in shape if size) >= 2**63:  # readers multiply sizes before they meet the zero
        return complain("has a shape of more elements than can be counted")
    spec = Spec(name, dtype, tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != spec.nbytes:
        shown = "×".join(map(str, shape)) or "scalar"
        return complain(f"is {dtype} {shown}, {spec.nbytes} bytes, but its offsets span {offsets[1] - offsets[0]}")
    return spec


def _are_sizes(value: Any) -> bool:
    """Tell whether a value is a list of whole numbers that a file could hold."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _bad_offsets(tensors: Mapping[str, Spec], data_size: int) -> list[str]:
    """Check that the tensors cover the data section without holes, overlaps or leftovers."""
    end = 0
    for spec in sorted(tensors.values(), key=lambda s: (s.offset, s.nbytes)):
        if spec.offset != end:
            what = "overlaps the one before it" if spec.offset < end else "leaves a hole before it"
            return [f"tensor `{_shown(spec.name)}` {what}: it begins at {spec.offset}, not at {end}"]
        end += spec.nbytes
    if end > data_size:
        return [f"the file is truncated: its tensors need {end} bytes of data, but it has {data_size}"]
    if end < data_size:
        return [f"{data_size - end} bytes follow the last tensor; nothing may"]
    return []
