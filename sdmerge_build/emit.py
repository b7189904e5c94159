"""Owns re-emission: a stored artifact's data behind a new header, without merging anything again.

Has never heard of torch. The data is hashed on its way, so a stored file that has gone bad is noticed and not passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdmerge_build.errors import IntegrityError, Issue
from sdmerge_build.tensorfile import Header, Layout, lay_out
from sdmerge_build.writer import Writer, Written

__all__ = ["can_reemit", "reemit"]

CHUNK = 4 << 20


def can_reemit(header: Header) -> bool:
    """Tell whether a file's data section lies as it would if it were written now."""
    return dict(header.tensors) == {spec.name: spec for spec in lay_out(header.tensors.values(), {}).specs}


def reemit(stored: Path, header: Header, layout: Layout, target: Path, tensor_digest: str, advanced: Callable[[int], None]) -> Written:
    """Write `target`, which must not exist, from a stored file's data and a new header.

    Raises `IntegrityError` when the data is no longer what `tensor_digest` says.
    """
    length = header.file_size - header.data_start
    with Writer([(target, layout)], [CHUNK], spare=2) as writer, stored.open("rb", buffering=0) as source, target.open("r+b", buffering=0) as out:
        source.seek(header.data_start)
        for index, start in enumerate(range(0, length, CHUNK)):
            buffers = writer.buffers()
            if buffers is None:
                break
            buffers.index, buffers.regions = index, [(start, min(CHUNK, length - start))]
            view = buffers.views[0][: buffers.regions[0][1]]
            while view and (count := source.readinto(view)):
                view = view[count:]
            writer.write([out], buffers)
            writer.done(buffers)
            advanced(buffers.regions[0][1])
        [written] = writer.finish()
    if written.tensor_digest != tensor_digest:
        raise IntegrityError(Issue(where=str(stored), what="the stored artifact is damaged", hint="remove its folder; the next run builds it again"))
    return written
