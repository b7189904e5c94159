"""Owns the assembly of a checkpoint that lies in several files: one state dict, under original names where they are known, in one safetensors file.

Has never heard of torch, of addresses or of any architecture; what its tensors are called in a diffusers folder is asked of `architectures`.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdmerge_build.architectures import recognise_folder
from sdmerge_build.architectures.diffusers import STACKED, TRANSPOSED, WIDENED, FolderNames, Place
from sdmerge_build.dtypes import ITEMSIZE
from sdmerge_build.errors import IntegrityError, Issue, named_briefly
from sdmerge_build.files import sync_folder
from sdmerge_build.formats.parts import MODEL_INDEX, Part, choose_parts, find_parts, is_entry, is_folder_checkpoint
from sdmerge_build.tensorfile import MAX_HEADER, MAX_NAME, MAX_TENSORS, Header, Layout, Spec, lay_out
from sdmerge_build.writer import Writer, Written

__all__ = ["MODEL_INDEX", "Part", "assemble", "assembled", "assembly_layout", "choose_parts", "find_parts", "is_entry", "is_folder_checkpoint"]

CHUNK = 4 << 20
MAX_TRANSPOSED = 16 << 20  # bytes; 1280×1280 doubles, the largest text projection there is, take 13 MB
METADATA = {"format": "pt"}
_MOST_COMPLAINTS = 20
_CODES: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}  # itemsize → how memoryview calls such elements

Piece = tuple[Part, Spec]


@dataclass(frozen=True, slots=True)
class _Joined:
    """A tensor of the result, the tensors it is made of, and how."""

    spec: Spec
    pieces: tuple[Piece, ...]
    how: str


def assembled(headers: Mapping[Part, Header]) -> tuple[Spec, ...]:
    """Tell the tensors that these parts make, in the order and with the offsets they will have in the file.

    Raises `IntegrityError` with the complaints: tensors that an index places elsewhere, two of one name, names that the architecture does not know.
    """
    return assembly_layout(headers).specs


def assembly_layout(headers: Mapping[Part, Header]) -> Layout:
    """Lay out the file that these parts make; raises as `assembled` does."""
    return _plan(headers)[0]


def assemble(root: Path, parts: Sequence[Part], headers: Mapping[Part, Header], target: Path, advanced: Callable[[int], None]) -> Written:
    """Write `target`, which must not exist, from parts below `root`, telling `advanced` the bytes as they are written.

    The result depends on the tensors alone, not on how they are divided or listed. Raises as `assembled` does, `IntegrityError` for a part that is no
    longer what its header said, and `OSError`; then there is no target.
    """
    layout, joined = _plan({part: headers[part] for part in parts})
    length = layout.size - len(layout.header)
    writer = Writer([(target, layout)], [CHUNK], spare=2)
    try:
        with writer, contextlib.closing(_runs(root, headers, joined)) as runs, target.open("r+b", buffering=0) as out:
            stream = _Stream(runs)
            for index, start in enumerate(range(0, length, CHUNK)):
                buffers = writer.buffers()
                if buffers is None:
                    break
                buffers.index, buffers.regions = index, [(start, min(CHUNK, length - start))]
                stream.fill(buffers.views[0][: buffers.regions[0][1]])
                writer.write([out], buffers)
                writer.done(buffers)
                advanced(buffers.regions[0][1])
            [written] = writer.finish()
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
    return written


def _plan(headers: Mapping[Part, Header]) -> tuple[Layout, list[_Joined]]:
    """Decide what the result holds, in file order, or raise every complaint."""
    complaints = [complaint for part in sorted(headers) for complaint in _false_claims(part, headers[part])]
    naming = recognise_folder({f"{part.component}.{name}" for part, header in headers.items() for name in header.tensors})
    joined: dict[str, _Joined] = {}
    for name, (place, held) in _gather(headers, naming, complaints).items():
        if whole := _join(name, place, held, complaints):
            joined[name] = whole
    if len(joined) > MAX_TENSORS:
        complaints.append(Issue(what=f"the parts hold {len(joined)} tensors; no more than {MAX_TENSORS} are read"))
    if long := [name for name in joined if len(name) > MAX_NAME]:
        complaints.append(Issue(what=f"a name is longer than {MAX_NAME}: `{long[0][:80]}…`"))
    layout = lay_out([whole.spec for whole in joined.values()], METADATA)
    if len(layout.header) > MAX_HEADER:
        complaints.append(Issue(what=f"the parts' headers make one of {len(layout.header)} bytes; no more than {MAX_HEADER} are read"))
    if len(complaints) > _MOST_COMPLAINTS:
        complaints[_MOST_COMPLAINTS:] = [Issue(what=f"and {len(complaints) - _MOST_COMPLAINTS} complaints more")]
    if complaints:
        raise IntegrityError(*complaints)
    return layout, [joined[spec.name] for spec in layout.specs]


def _false_claims(part: Part, header: Header) -> Iterator[Issue]:
    """Compare a shard with what its index says of it."""
    if part.claimed is None:
        return
    if lacking := sorted(set(part.claimed) - header.tensors.keys()):
        yield Issue(where=part.path, what=f"does not hold {named_briefly(lacking)}, as its index says")
    if extra := sorted(header.tensors.keys() - set(part.claimed)):
        yield Issue(where=part.path, what=f"holds {named_briefly(extra)}, which its index does not place there")


Held = dict[int, Piece]
"""Pieces of a tensor, by their place in it."""


def _gather(headers: Mapping[Part, Header], naming: FolderNames | None, complaints: list[Issue]) -> dict[str, tuple[Place, Held]]:
    """Collect the pieces of every tensor of the result."""
    gathered: dict[str, tuple[Place, Held]] = {}
    for part in sorted(headers):
        strangers = []
        for name, spec in headers[part].tensors.items():
            if naming and (part.component, name) in naming.dropped:
                continue
            if naming and (part.component, name) not in naming.originals:
                strangers.append(name)
                continue
            if naming:
                original, n = naming.originals[part.component, name]
                place = naming.places[original]
            else:
                original, n = f"{part.component}.{name}" if part.component else name, 0
                place = Place(part.component, (name,))
            _, held = gathered.setdefault(original, (place, {}))
            if n in held:
                other, before = held[n]
                what = f"`{name}` is the same tensor as `{before.name}` of {other.path}"
                complaints.append(Issue(where=part.path, what=what, hint="a checkpoint holds each tensor once"))
            held[n] = part, spec
        if naming and strangers:
            what = f"{named_briefly(sorted(strangers), most=5)}: no such tensor is known of {naming.architecture} in diffusers folders"
            complaints.append(Issue(where=part.path, what=what))
    return gathered


def _join(name: str, place: Place, held: Held, complaints: list[Issue]) -> _Joined | None:
    """Make one tensor of its pieces, or complain."""
    pieces = tuple(held[n] for n in sorted(held))
    part, first = pieces[0]

    def complain(what: str) -> None:
        complaints.append(Issue(where=part.path, what=what))

    shape, how = first.shape, place.how
    if how == STACKED:
        if lacking := [theirs for n, theirs in enumerate(place.names) if n not in held]:
            return complain(f"{named_briefly(lacking)}: not there, and `{name}` is made of {named_briefly(place.names)}")
        if not first.numel or not shape:
            return complain(f"`{first.name}` is {first.dtype} {_shown(shape)}, which cannot be stacked into `{name}`")
        if len({(spec.dtype, spec.shape) for _, spec in pieces}) > 1:
            each = ", ".join(f"`{spec.name}` {spec.dtype} {_shown(spec.shape)}" for _, spec in pieces)
            return complain(f"{each}: differ in dtype or shape, and are one tensor, `{name}`, in a checkpoint")
        shape = (len(pieces) * shape[0], *shape[1:])
    elif how == TRANSPOSED:
        if len(shape) != 2 or first.nbytes > MAX_TRANSPOSED:
            return complain(f"`{first.name}` is {first.dtype} {_shown(shape)}, not a matrix of at most {MAX_TRANSPOSED} bytes")
        shape = shape[::-1]
    elif how == WIDENED:
        if len(shape) not in {2, 4} or math.prod(shape[2:]) != 1:
            return complain(f"`{first.name}` is {_shown(shape)}, neither a matrix nor a 1×1 convolution")
        shape = (*shape[:2], 1, 1)
    return _Joined(Spec(name, first.dtype, shape), pieces, how)


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


Run = tuple[io.FileIO | io.BytesIO, int]
"""An open file and how many of its bytes come next."""


def _runs(root: Path, headers: Mapping[Part, Header], joined: Sequence[_Joined]) -> Generator[Run, None, None]:
    """Open the parts where each tensor's bytes lie, in file order; one is open at a time, so that no number of shards is too many."""
    for whole in joined:
        for part, spec in whole.pieces:
            with (root / part.path).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != headers[part].file_size:
                    raise _changed(file)
                file.seek(headers[part].data_start + spec.offset)
                if whole.how == TRANSPOSED:
                    raw = bytearray(spec.nbytes)
                    _read_into(file, memoryview(raw))
                    yield io.BytesIO(_transposed(raw, spec)), spec.nbytes
                else:
                    yield file, spec.nbytes


class _Stream:
    """The bytes of many runs as one stream."""

    def __init__(self, runs: Iterator[Run]) -> None:
        self._runs = runs
        self._file: io.FileIO | io.BytesIO = io.BytesIO()
        self._left = 0

    def fill(self, view: memoryview) -> None:
        """Fill memory with the bytes that come next."""
        while view:
            while not self._left:
                self._file, self._left = next(self._runs)
            count = min(len(view), self._left)
            _read_into(self._file, view[:count])
            view, self._left = view[count:], self._left - count


def _read_into(file: io.FileIO | io.BytesIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise _changed(file)
        view = view[count:]


def _changed(file: io.FileIO | io.BytesIO) -> IntegrityError:
    return IntegrityError(Issue(where=str(getattr(file, "name", "")), what="is not the size its header said: it changed while it was being read"))


def _transposed(raw: bytearray, spec: Spec) -> bytearray:
    """Turn the rows of a matrix into columns."""
    rows, columns = spec.shape
    result = bytearray(len(raw))
    source, target = (memoryview(data).cast(_CODES[ITEMSIZE[spec.dtype]]) for data in (raw, result))
    for n in range(columns if raw else 0):
        target[n * rows : (n + 1) * rows] = source[n::columns]
    return result
