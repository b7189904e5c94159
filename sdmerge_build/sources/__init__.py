"""Owns where sources are: finds each one's file on this machine and proves that it is the one the recipe means.

Has never heard of steps or merging. A name finds candidates, content decides.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdmerge_build.errors import IntegrityError, Issue, SdbuildError, SourceError
from sdmerge_build.files import Snapshot, readable_size
from sdmerge_build.recipe import Recipe, SourceTable
from sdmerge_build.sources.hashing import Digests, Request, learn_digests
from sdmerge_build.sources.memo import Memo
from sdmerge_build.sources.uri import UriError, page_of
from sdmerge_build.tensorfile import Header, read_header

__all__ = ["Found", "Memo", "UriError", "find_sources", "page_of"]

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A source's file, its header, what its bytes are known by, and the snapshot all of that holds for."""

    path: Path
    header: Header
    digests: Digests
    snapshot: Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Where to look, what is remembered, and how to read."""

    folders: Sequence[Path]
    memo: Memo
    jobs: int
    reading: Callable[[int], None]  # told the bytes that will be read, before the first is
    advanced: Callable[[int], None]


def find_sources(recipe: Recipe, sources: Mapping[str, SourceTable], search: Search) -> tuple[dict[str, Found], dict[str, SdbuildError]]:
    """Find every source; return what was found, and for each that was not, the error that says what to do.

    A candidate is taken when its size and digests are those the recipe pins. Likely candidates come first; those of one round that
    nothing is known of are read together, each a single time.
    """
    index = _Index(search.folders)
    rounds = {name: list(_candidates(recipe, source, index)) for name, source in sources.items()}
    tried: dict[str, list[Path]] = {name: [] for name in sources}
    seen = _Seen()
    found: dict[str, Found] = {}
    for n in range(max(map(len, rounds.values()), default=0)):
        now = {name: list(turns[n]) for name, turns in rounds.items() if name not in found and n < len(turns)}
        seen.look(sources, now, search)
        for name, paths in now.items():
            tried[name] += [path for path in paths if path not in tried[name]]
            if match := _choose(sources[name], paths, seen):
                found[name] = match
    errors = {name: _absence(recipe, name, source, tried[name], seen) for name, source in sources.items() if name not in found}
    return {name: found[name] for name in sources if name in found}, errors


def _candidates(recipe: Recipe, source: SourceTable, index: _Index) -> Iterator[Iterable[Path]]:
    """Yield the files a source may be, in rounds: by path, by name, by size, and at last, when a digest is pinned, all there are."""
    if source.path:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a path no system knows leads nowhere
            if (path := recipe.path.parent / Path(source.path).expanduser()).exists():
                yield [path]
                return
    if source.path and not (source.filename or source.sha256 or source.blake3):
        return
    if source.filename:
        yield (path for path in index.named(source.filename) if source.size is None or path.stat().st_size == source.size)
    if source.sha256 or source.blake3:
        yield index.sized(source.size) if source.size is not None else index.all()


class _Seen:
    """What was seen of candidates: their headers, or why they have none, and their digests."""

    def __init__(self) -> None:
        self.headers: dict[Path, Header | SdbuildError] = {}
        self.snapshots: dict[Path, Snapshot] = {}
        self.digests: dict[Path, Digests] = {}

    def look(self, sources: Mapping[str, SourceTable], candidates: Mapping[str, Sequence[Path]], search: Search) -> None:
        """Read the headers of candidates, and learn their digests from the memo or by reading them whole."""
        wanted: dict[Path, tuple[bool, bool]] = {}
        for name, paths in candidates.items():
            for path in paths:
                sha256, blake3 = wanted.get(path, (False, False))
                wanted[path] = sha256 or bool(sources[name].sha256), blake3 or bool(sources[name].blake3)
        requests = []
        for path, (sha256, blake3) in wanted.items():
            if path not in self.headers:
                self.headers[path] = self._header(path)
            header = self.headers[path]
            known = self.digests.get(path) or search.memo.recall(path, self.snapshots.get(path))
            if known and (known.sha256 or not sha256) and (known.blake3 or not blake3):
                self.digests[path] = known
            elif isinstance(header, Header):
                requests.append(Request(path=path, header=header, sha256=sha256, blake3=blake3))
        if requests:
            search.reading(sum(request.header.file_size for request in requests))
            learned = learn_digests(requests, search.jobs, search.advanced)
            for request, (digests, snapshot) in zip(requests, learned, strict=True):
                if snapshot != self.snapshots[request.path]:
                    raise IntegrityError(Issue(where=str(request.path), what="the file changed while it was being read"))
                self.digests[request.path] = digests
                search.memo.remember(request.path, digests, snapshot)
            search.memo.save()

    def _header(self, path: Path) -> Header | SdbuildError:
        try:
            self.snapshots[path] = Snapshot.of(path)
            return read_header(path)
        except SdbuildError as error:
            return error
        except OSError as error:
            return SourceError(Issue(where=str(path), what=f"cannot be read: {error.strerror}"))


class _Index:
    """The model files below some folders; looked through once, and only when a source needs it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._files: list[Path] | None = None

    def all(self) -> list[Path]:
        """List every model file, in an order that does not depend on the file system."""
        if self._files is None:
            self._files = [path for folder in self._folders for path in _walk(folder)]
        return self._files

    def named(self, filename: str) -> list[Path]:
        """List the files of a name; upper and lower case do not count, as on Windows and macOS."""
        return [path for path in self.all() if path.name.casefold() == filename.casefold()]

    def sized(self, size: int) -> list[Path]:
        """List the files of a size in bytes."""
        return [path for path in self.all() if path.stat().st_size == size]


def _walk(folder: Path) -> Iterator[Path]:
    """Walk a folder, links included, each real folder once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (path for name in sorted(files) if name.endswith(SUFFIX) and (path := Path(root, name)).is_file())


def _choose(source: SourceTable, paths: Sequence[Path], seen: _Seen) -> Found | None:
    for path in paths:
        header = seen.headers[path]
        if isinstance(header, Header) and path in seen.digests and not _mismatches(source, header, seen.digests[path]):
            return Found(path=path, header=header, digests=seen.digests[path], snapshot=seen.snapshots[path])
    return None


def _mismatches(source: SourceTable, header: Header, digests: Digests) -> list[str]:
    """Quote both sides of every pin that does not hold."""
    pins = [
        ("size", source.size, header.file_size),
        ("sha256", source.sha256 and source.sha256.lower(), digests.sha256),
        ("blake3", source.blake3 and source.blake3.lower(), digests.blake3),
    ]
    return [f"its {name} is {actual}, not {pinned} as the recipe says" for name, pinned, actual in pins if pinned is not None and pinned != actual]


def _absence(recipe: Recipe, name: str, source: SourceTable, paths: Sequence[Path], seen: _Seen) -> SdbuildError:
    """Say why a source was not found: damaged, not the file that was pinned, or nowhere."""
    where = recipe.where("source", name)
    issues = []
    strangers = 0
    for path in paths:
        header = seen.headers[path]
        is_named = bool(source.path) or (source.filename or "").casefold() == path.name.casefold()
        if not is_named:
            strangers += 1
        elif isinstance(header, SdbuildError):
            issues += [Issue(where=where, what=f"source `{name}`: {issue.where}: {issue.what}", hint=issue.hint) for issue in header.issues]
        else:
            issues += [Issue(where=where, what=f"source `{name}`: {path}: {text}") for text in _mismatches(source, header, seen.digests[path])]
    if source.path and paths:
        return IntegrityError(*issues)
    what = f"source `{name}` is nowhere to be found"
    if source.path:
        what = f"source `{name}`: there is no file `{source.path}` beside the recipe"
    if strangers:
        others = f"{strangers} other files" if strangers > 1 else "another file"
        what += f"; {others} in the folders of models could have been it, and {'are' if strangers > 1 else 'is'} not"
    return SourceError(Issue(where=where, what=what, hint=_where_to_get(source)), *issues)


def _where_to_get(source: SourceTable) -> str:
    """Say what file is meant, where it can be had and where to put it."""
    if source.path and not (source.filename or source.uri):
        name = Path(source.path).name
        return (
            f'correct `path`, which is seen from the recipe\'s folder, or write `filename = "{name}"` to have it looked for in your folders of models'
        )
    facts = [
        source.filename or "a file",
        f"{readable_size(source.size)} ({source.size} bytes)" if source.size is not None else "",
        f"sha256 {source.sha256}" if source.sha256 else "",
        f"blake3 {source.blake3}" if source.blake3 else "",
    ]
    address = page_of(source.uri) if source.uri else source.homepage
    text = f"it is {', '.join(filter(None, facts))}" + (f"; get it from {address}" if address else "")
    return text + "; put it into any folder and name that folder with --models, or in SDBUILD_MODELS"
