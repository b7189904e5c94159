"""Owns sources that are not one safetensors file: tells what they are, and has each converted once, into the stock.

Has never heard of recipes. What a conversion is kept under is the digest of what it was made of, so that it is found again wherever that lies.
The code that converts is imported when something must be: most sources are safetensors files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdmerge_build.digest import Digest
from sdmerge_build.errors import IntegrityError, Issue
from sdmerge_build.events import Watcher
from sdmerge_build.files import as_space_error, owner_tag, readable_size
from sdmerge_build.sources.hashing import Digests
from sdmerge_build.sources.stock import Stock
from sdmerge_build.tensorfile import read_header

__all__ = ["Foreign", "kind_of", "made_place"]

VERSION = 1
"""Raised when the same files would be converted into other tensors."""


def kind_of(path: Path) -> str:
    """Tell what a checkpoint is kept as: `safetensors`, which is also the answer where nothing else fits, `pickle`, `shards` or `diffusers`."""
    if path.suffix == ".json" or path.is_dir():
        from sdmerge_build.formats.parts import MODEL_INDEX, is_folder_checkpoint  # noqa: PLC0415

        if is_folder_checkpoint(path):
            return "diffusers" if path.is_dir() or path.name == MODEL_INDEX else "shards"
    if not path.is_file():
        return "safetensors"
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        return "safetensors"
    from sdmerge_build.formats.pickled import looks_pickled  # noqa: PLC0415

    return "pickle" if looks_pickled(start) else "safetensors"


def made_place(stock: Stock, digest: str, kind: str) -> Path:
    """Say where the store keeps what was made of files that `digest` stands for."""
    return stock.place_of(digest, f".{kind}{VERSION}.safetensors")


@dataclass(frozen=True, slots=True)
class Foreign:
    """A checkpoint that must be converted; `kind` is one of `kind_of`."""

    kind: str

    def pickle_converted(self, path: Path, digests: Digests, stock: Stock, watcher: Watcher, check: Callable[[], None]) -> Path:
        """Return the safetensors file made of a pickle; made now, in a process of its own, if it is not there yet.

        `check` raises when the pickle is not any more what was hashed.
        """
        from sdmerge_build.formats.pickled import convert_pickle  # noqa: PLC0415

        assert digests.blake3, "BUG: a pickle is hashed before it is converted"
        made = made_place(stock, digests.blake3, "pickle")
        if not made.exists():
            watcher.note(f"converting {path.name} ({readable_size(path.stat().st_size)}), once")
            left_out: list[str] = []

            def make(target: Path) -> None:
                left_out.extend(convert_pickle(path, target))

            _make(made, stock, make, check, path.stat().st_size)
            if left_out:
                watcher.note(f"{path.name} also holds {', '.join(left_out[:8])}, which is left out")
        return made

    @staticmethod
    def files(path: Path) -> list[Path]:
        """List the files of a sharded checkpoint or a diffusers folder."""
        from sdmerge_build.formats.parts import find_parts  # noqa: PLC0415

        root, parts = find_parts(path)
        return list(dict.fromkeys(root / part.path for part in parts))

    def assembled(self, path: Path, digests: Mapping[Path, str], stock: Stock, watcher: Watcher, check: Callable[[], None]) -> Path:
        """Return the one safetensors file made of a folder's files, whose tensors' digests are known; made now if it is not there yet."""
        from sdmerge_build.formats.folder import assemble, find_parts  # noqa: PLC0415

        root, parts = find_parts(path)
        digest = Digest()
        for part in parts:
            digest.fact(part.component, digests[root / part.path])
        made = made_place(stock, digest.hexdigest(), self.kind)
        if not made.exists():
            headers = {part: read_header(root / part.path) for part in parts}
            size = sum(header.file_size for header in headers.values())
            watcher.started(f"putting {path.name} together", size)
            _make(made, stock, lambda target: assemble(root, parts, headers, target, watcher.advanced), check, size)
            watcher.finished()
        return made


def _make(made: Path, stock: Stock, make: Callable[[Path], object], check: Callable[[], None], needed: int) -> None:
    """Let a file be made beside its place, and move it there once it is whole and what it was made of is still the same."""
    check()
    made.parent.mkdir(parents=True, exist_ok=True)
    target = made.with_name(f".{owner_tag()}.making")
    try:
        with as_space_error(made.parent, needed):
            make(target)
        check()
        stock.settle(target, made)
    except FileNotFoundError as error:
        raise IntegrityError(Issue(where=str(error.filename), what="a file of the checkpoint is gone")) from None
    finally:
        target.unlink(missing_ok=True)
