"""Owns where sources are on this machine: finds each one's file and proves that it is the one the recipe means.

Has never heard of steps, merging or the network. A name finds candidates, content decides.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdmerge_build.errors import IntegrityError, Issue, RecipeError, SdbuildError, SourceError
from sdmerge_build.events import Watcher
from sdmerge_build.files import Snapshot, readable_size
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources.folders import SUFFIXES, Index
from sdmerge_build.sources.foreign import Foreign, kind_of
from sdmerge_build.sources.hashing import Digests, Request, learn_digests
from sdmerge_build.sources.memo import Memo
from sdmerge_build.sources.stock import Stock
from sdmerge_build.sources.uri import page_of
from sdmerge_build.tensorfile import Header, read_header

__all__ = ["Found", "Search", "Wanted", "find_sources", "several_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A source that is looked for: what is said of it, the folder its path is seen from, and the line that asks for it."""

    name: str
    table: SourceTable
    folder: Path
    where: str
    made: tuple[Path, str, int] | None = None  # what was made of several files earlier: the file, of what kind of folder, of how many bytes

    @property
    def local(self) -> Path | None:
        """Return the file or folder that its `path` names, if there is one."""
        if self.table.path:
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # a path no system knows leads nowhere
                if (path := self.folder / Path(self.table.path).expanduser()).exists():
                    return path
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A source's safetensors file, its header, what its bytes are known by, and the snapshot all of that holds for.

    What was converted has the digests of the file it was made of, beside the digest of its own tensors.
    """

    path: Path
    header: Header
    digests: Digests
    snapshot: Snapshot
    size: int  # bytes of the source's own file; of a folder's files together
    kind: str = "safetensors"  # what it was converted from: `pickle`, `shards` or `diffusers`
    original: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Where to look, what is remembered, and how to read."""

    folders: Sequence[Path]
    stock: Stock
    memo: Memo
    jobs: int
    watcher: Watcher
    on_read: Callable[[], None]  # called before the first large file is read
    learns_all: bool = False  # whole-file digests of every source, pinned or not

    def reading(self, nbytes: int) -> None:
        """Tell that this many bytes will be read."""
        self.on_read()
        self.watcher.started("reading sources", nbytes)


def find_sources(sources: Sequence[Wanted], search: Search) -> tuple[dict[str, Found], dict[str, SdbuildError]]:
    """Find every source; return what was found, and for each that was not, the error that says what to do.

    A candidate is taken when its size and digests are those that are pinned. Likely candidates come first; those of one round that
    nothing is known of are read together, each a single time.
    """
    index = Index([*search.folders, search.stock.folder])
    tried: dict[str, list[Path]] = {source.name: [] for source in sources}
    seen = _Seen(search)
    found: dict[str, Found] = {}
    errors: dict[str, SdbuildError] = {}
    rounds = {source.name: [] if _is_folder(source) else list(_candidates(source, index, search.stock)) for source in sources}
    for n in range(max(map(len, rounds.values()), default=0)):
        now = [(s, list(rounds[s.name][n])) for s in sources if s.name not in found and n < len(rounds[s.name])]
        seen.look(now)
        for source, paths in now:
            tried[source.name] += [path for path in paths if path not in tried[source.name]]
            if match := _choose(source, paths, seen):
                _keep(source, functools.partial(seen.opened, match), found, errors)
    for source in sources:
        if source.made and source.name not in found:
            _keep(source, functools.partial(seen.opened_again, *source.made), found, errors)
        elif _is_folder(source) and (pins := [pin for pin in ("size", "sha256", "blake3") if getattr(source.table, pin) is not None]):
            errors[source.name] = several_files(source, pins)
        elif _is_folder(source) and (path := source.local):
            _keep(source, functools.partial(seen.opened_folder, path), found, errors)
    errors |= {s.name: _absence(s, tried[s.name], seen) for s in sources if s.name not in found and s.name not in errors}
    return {s.name: found[s.name] for s in sources if s.name in found}, {s.name: errors[s.name] for s in sources if s.name in errors}


def several_files(source: Wanted, pins: Sequence[str]) -> RecipeError:
    """Refuse pins of one file for a source that is several."""
    what = f"source `{source.name}` is several files, which {' and '.join(f'`{pin}`' for pin in pins)} cannot pin"
    return RecipeError(Issue(where=source.where, what=what, hint="leave it out; `sdbuild lock` notes what they are"))


def _keep(source: Wanted, opened: Callable[[], Found], found: dict[str, Found], errors: dict[str, SdbuildError]) -> None:
    """Open what was chosen; what is wrong with it is said of the source."""
    try:
        found[source.name] = opened()
    except SdbuildError as error:
        errors[source.name] = type(error)(
            *(Issue(where=source.where, what=f"source `{source.name}`: {issue.where}: {issue.what}", hint=issue.hint) for issue in error.issues)
        )


def _is_folder(source: Wanted) -> bool:
    return bool((path := source.local) and kind_of(path) in {"shards", "diffusers"})


def _candidates(source: Wanted, index: Index, stock: Stock) -> Iterator[Iterable[Path]]:
    """Yield the files a source may be, in rounds: by path, by name, from the stock, by size, and at last, when a digest is pinned, all there are."""
    table = source.table
    if path := source.local:
        yield [path]
        return
    if table.path and not (table.filename or table.sha256 or table.blake3):
        return
    if table.blake3:
        yield [path for suffix in SUFFIXES if (path := stock.place_of(table.blake3.lower(), suffix)).exists()]
    if table.filename:
        yield (path for path in index.named(table.filename) if table.size is None or path.stat().st_size == table.size)
    if table.sha256 or table.blake3:
        yield index.sized(table.size) if table.size is not None else index.all()


class _Seen:
    """What was seen of candidates: their headers, or what else they are, or why they are nothing; and their digests."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self.headers: dict[Path, Header | Foreign | SdbuildError] = {}
        self.snapshots: dict[Path, Snapshot] = {}
        self.digests: dict[Path, Digests] = {}

    def look(self, candidates: Sequence[tuple[Wanted, Sequence[Path]]]) -> None:
        """Read the headers of candidates, and learn their digests from the memo or by reading them whole."""
        wanted: dict[Path, tuple[bool, bool]] = {}
        for source, paths in candidates:
            for path in paths:
                sha256, blake3 = wanted.get(path, (False, False))
                wanted[path] = sha256 or bool(source.table.sha256), blake3 or bool(source.table.blake3)
        requests = []
        for path, pinned in wanted.items():
            if path not in self.headers:
                self.headers[path] = self._header(path)
            header = self.headers[path]
            if isinstance(header, SdbuildError):
                continue
            whole = self._search.learns_all or isinstance(header, Foreign)  # a pickle is known by its own digests, and converted under one of them
            sha256, blake3 = (pin or whole for pin in pinned)
            known = self.digests.get(path) or self._search.memo.recall(path, self.snapshots.get(path))
            if known and (known.tensors or isinstance(header, Foreign)) and (known.sha256 or not sha256) and (known.blake3 or not blake3):
                self.digests[path] = known
            else:
                requests.append(Request(path=path, header=None if isinstance(header, Foreign) else header, sha256=sha256, blake3=blake3))
        self._learn(requests)

    def _learn(self, requests: Sequence[Request]) -> None:
        """Read files whole, each once."""
        if not requests:
            return
        search = self._search
        search.reading(sum(self.snapshots[request.path].size for request in requests))
        learned = learn_digests(requests, search.jobs, search.watcher.advanced)
        for request, (digests, snapshot) in zip(requests, learned, strict=True):
            if snapshot != self.snapshots[request.path]:
                raise IntegrityError(Issue(where=str(request.path), what="the file changed while it was being read"))
            self.digests[request.path] = digests
            search.memo.remember(request.path, digests, snapshot)
        search.memo.save()

    def _header(self, path: Path) -> Header | Foreign | SdbuildError:
        try:
            self.snapshots[path] = Snapshot.of(path)
            if path.is_dir():
                hint = "name the index of its shards, or one of its files"
                raise IntegrityError(Issue(where=str(path), what="is a folder without a model_index.json", hint=hint))
            return Foreign("pickle") if kind_of(path) == "pickle" else read_header(path)
        except SdbuildError as error:
            return error
        except OSError as error:
            return SourceError(Issue(where=str(path), what=f"cannot be read: {error.strerror}"))

    def opened(self, path: Path) -> Found:
        """Return a candidate that was chosen, converted if that is needed. Raises what the conversion raises."""
        header, digests, snapshot = self.headers[path], self.digests[path], self.snapshots[path]
        if isinstance(header, Header):
            return Found(path=path, header=header, digests=digests, snapshot=snapshot, size=header.file_size)
        assert isinstance(header, Foreign), "BUG: a candidate that cannot be read was chosen"
        stock, watcher = self._search.stock, self._search.watcher
        check = functools.partial(self._refuse_changes, [path])
        return self._converted(lambda: header.pickle_converted(path, digests, stock, watcher, check), digests, "pickle", path, snapshot.size)

    def opened_folder(self, path: Path) -> Found:
        """Return a sharded checkpoint or a diffusers folder, put together into one file."""
        foreign = Foreign(kind_of(path))
        files = foreign.files(path)
        for file in files:
            self.headers[file] = self._header(file)
        self._learn([r for file in files if (r := self._unknown(file))])
        stock, watcher = self._search.stock, self._search.watcher
        check = functools.partial(self._refuse_changes, files)
        digests = {file: self.digests[file].tensors for file in files}
        size = sum(self.snapshots[file].size for file in files)
        return self._converted(lambda: foreign.assembled(path, digests, stock, watcher, check), Digests(tensors=""), foreign.kind, path, size)

    def opened_again(self, made: Path, kind: str, size: int) -> Found:
        """Return what was put together earlier, of files of `size` bytes."""
        return self._converted(lambda: made, Digests(tensors=""), kind, None, size)

    def _refuse_changes(self, files: Sequence[Path]) -> None:
        """Refuse files that are not as they were when they were hashed: what is made of them would be kept under a digest that lies."""
        for file in files:
            if Snapshot.of(file) != self.snapshots[file]:
                raise IntegrityError(
                    Issue(where=str(file), what="the file changed while it was being converted", hint="run again once it is at rest")
                )

    def _unknown(self, file: Path) -> Request | None:
        header = self.headers[file]
        if isinstance(header, SdbuildError):
            raise header
        if isinstance(header, Foreign):
            raise IntegrityError(Issue(where=str(file), what="is a pickle; a folder's parts must be safetensors files"))
        if (known := self._search.memo.recall(file, self.snapshots[file])) and known.tensors:
            self.digests[file] = known
            return None
        return Request(path=file, header=header)

    def _converted(self, make: Callable[[], Path], digests: Digests, kind: str, original: Path | None, size: int) -> Found:
        """Open what was made of a source; what is damaged, or no longer what was made, is made once more."""
        for _ in range(2):
            made = make()
            with contextlib.suppress(OSError, IntegrityError):
                snapshot, header = Snapshot.of(made), read_header(made)
                own = self._search.memo.recall(made, snapshot)
                if own is None or not own.tensors:
                    self.headers[made], self.snapshots[made] = header, snapshot
                    self._learn([Request(path=made, header=header)])
                    own = self.digests[made]
                if self._search.stock.vouches(made, own.tensors):
                    whole = replace(digests, tensors=own.tensors)
                    return Found(path=made, header=header, digests=whole, snapshot=snapshot, size=size, kind=kind, original=original)
            self._search.stock.discard(made)
        raise IntegrityError(Issue(where=str(made), what="is damaged", hint="remove it; it is made again of what it was made of"))


def _choose(source: Wanted, paths: Sequence[Path], seen: _Seen) -> Path | None:
    return next((path for path in paths if path in seen.digests and not _mismatches(source, path, seen)), None)


def _mismatches(source: Wanted, path: Path, seen: _Seen) -> list[str]:
    """Quote both sides of every pin that does not hold."""
    table, digests = source.table, seen.digests[path]
    pins = [
        ("size", table.size, seen.snapshots[path].size),
        ("sha256", table.sha256 and table.sha256.lower(), digests.sha256),
        ("blake3", table.blake3 and table.blake3.lower(), digests.blake3),
    ]
    return [f"its {name} is {actual}, not {pinned} as pinned" for name, pinned, actual in pins if pinned is not None and pinned != actual]


def _absence(source: Wanted, paths: Sequence[Path], seen: _Seen) -> SdbuildError:
    """Say why a source was not found: damaged, not the file that was pinned, or nowhere."""
    where, name, table = source.where, source.name, source.table
    issues = []
    strangers = 0
    for path in paths:
        header = seen.headers[path]
        is_named = path == source.local or (table.filename or "").casefold() == path.name.casefold()
        if not is_named:
            strangers += 1
        elif isinstance(header, SdbuildError):
            issues += [Issue(where=where, what=f"source `{name}`: {issue.where}: {issue.what}", hint=issue.hint) for issue in header.issues]
        else:
            issues += [Issue(where=where, what=f"source `{name}`: {path}: {text}") for text in _mismatches(source, path, seen)]
    if source.local:
        return IntegrityError(*issues)
    what = f"source `{name}` is nowhere to be found"
    if table.path:
        what = f"source `{name}`: there is no file `{table.path}` beside the recipe"
    if strangers:
        others = f"{strangers} other files" if strangers > 1 else "another file"
        what += f"; {others} in the folders of models could have been it, and {'are' if strangers > 1 else 'is'} not"
    return SourceError(Issue(where=where, what=what, hint=_where_to_get(table)), *issues)


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
