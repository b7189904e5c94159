"""Owns which bytes each source is: from recipe, lock, folders, store and hubs to facts that keys can stand on, and to files.

Has never heard of methods or artifacts. Asks least first: the lock, then this machine, then headers from elsewhere, then whole files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmerge_build.errors import IntegrityError, Issue, RecipeError, SdbuildError, SourceError, SpaceError, UnreachableError
from sdmerge_build.events import Watcher
from sdmerge_build.facts import Facts, claims_in
from sdmerge_build.files import free_space, readable_size
from sdmerge_build.lock import Entry, Lock
from sdmerge_build.plan import Plan
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources import Found, Search, Wanted, find_sources
from sdmerge_build.sources.foreign import made_place
from sdmerge_build.sources.search import several_files
from sdmerge_build.store import Store
from sdmerge_build.tensorfile import Header, read_header

if TYPE_CHECKING:
    from sdmerge_build.sources.offers import Offer
    from sdmerge_build.sources.remote import Hubs, Order

__all__ = ["Reach", "Supply", "refuse_full_disk"]

_MOST_NOTES = 20  # of what a lock says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far to go for a source: which folders, whether the lock is law, whether anybody may be asked."""

    folders: tuple[Path, ...] = ()
    jobs: int = 1
    locked: bool = False
    offline: bool = False
    allow_private: bool = False


class Supply:
    """The sources of one plan, as they become known."""

    def __init__(
        self, plan: Plan, store: Store, lock: Lock, reach: Reach, watcher: Watcher, on_read: Callable[[], None], *, learns_all: bool = False
    ) -> None:
        self._plan, self._store, self._lock, self._reach, self._watcher = plan, store, lock, reach, watcher
        folders, memo = reach.folders, store.memo
        self._search = Search(folders=folders, stock=store.stock, memo=memo, jobs=reach.jobs, watcher=watcher, on_read=on_read, learns_all=learns_all)
        self._relock = f"`sdbuild lock {plan.recipe.path}` writes {'the lock anew' if lock.exists else 'one'}"
        self._hubs: Hubs | None = None
        self.facts: dict[str, Facts] = {}
        self.found: dict[str, Found] = {}
        self.headers: dict[str, Header] = {}  # of what is here, and of what was looked at from afar
        self.offers: dict[str, Offer] = {}  # what hubs say of files
        self.orders: dict[str, Order] = {}  # what is to be downloaded
        self.missing: dict[str, int] = {}  # bytes that are to be downloaded for a source
        self.errors: dict[str, SdbuildError] = {}
        self._pending: dict[str, SdbuildError] = {}  # what is not on this machine, and could be elsewhere
        self._absent: dict[str, SdbuildError] = {}  # why what was ordered is not here
        self._wanted = {
            name: Wanted(name=name, table=table, folder=plan.origins[name].recipe.path.parent, where=plan.where("source", name))
            for name, table in plan.sources.items()
        }
        self._entries = self._valid_entries()

    def glance(self) -> dict[str, Facts]:
        """Return what can be known of sources' terms by reading headers alone: from the lock, and of files that lie at their path."""
        facts = {name: Facts.locked(entry) for name, entry in self._entries.items()}
        for name in set(self._wanted) - set(facts):
            with contextlib.suppress(SdbuildError, OSError):
                if place := self._wanted[name].local:
                    claims = claims_in(read_header(place).metadata)
                    facts[name] = Facts(tensors="", size=0, sha256=None, blake3=None, kind="", made="", claims=claims)
        return facts

    def look(self) -> None:
        """Know what can be known without asking anybody: from the lock, and for what is not in it from files."""
        locked = {name for name in self._entries if self._wanted[name].local is None}
        self.facts |= {name: Facts.locked(self._entries[name]) for name in locked}
        self.seek(set(self._wanted) - locked)

    def seek(self, names: Collection[str]) -> None:
        """Look for files on this machine: by path, in the folders of models, in the store."""
        sought = [self._pinned(name) for name in self._wanted if name in names and name not in self.found and name not in self._pending]
        try:
            found, errors = find_sources(sought, self._search)
        finally:
            self._watcher.finished()
        for name, file in found.items():
            self._take(name, file)
        for name, error in errors.items():
            uri = self._wanted[name].table.uri
            if isinstance(error, SourceError) and uri:
                self._pending[name] = error
            else:
                self.errors[name] = error

    def order(self, names: Collection[str], *, is_plan: bool) -> None:
        """Find out where what is not here can be had, and look at its header from afar; for a plan, offline, its size is enough."""
        for name in [name for name in self._pending if name in names]:
            error = self._absent[name] = self._pending.pop(name)
            try:
                self._order(name, error, is_plan=is_plan)
            except UnreachableError as failure:
                self.errors[name] = self._unreachable(name, failure)
            except SdbuildError as failure:
                self.errors[name] = failure

    def resolve(self, earlier: Mapping[str, Entry]) -> None:
        """Ask the hubs what every address means today, with their terms; what they say of a file's bytes must then hold.

        A checkpoint of several files that is still at the commit it was put together at is not downloaded again.
        """
        for name, wanted in self._wanted.items():
            if not wanted.table.uri:
                continue
            try:
                offer = self._remote().offer(name, wanted.where, wanted.table.uri, wanted.table, with_terms=True)
            except SdbuildError as failure:
                self.errors[name] = failure
                continue
            self.offers[name] = offer
            was = earlier.get(name)
            if offer.parts:
                if was and was.made and was.revision == offer.revision and (place := made_place(self._store.stock, was.made, was.kind)).exists():
                    self._wanted[name] = replace(wanted, made=(place, was.kind, was.size))
                continue
            said = {"sha256": offer.sha256} if offer.sha256 else {"blake3": offer.blake3}
            if not (wanted.table.sha256 or wanted.table.blake3 or wanted.local) and any(said.values()):
                self._wanted[name] = replace(wanted, table=wanted.table.model_copy(update=said))

    def cancel(self, names: Collection[str]) -> None:
        """Take orders back: what they were for cannot be made."""
        for name in names:
            self.orders.pop(name, None)
            self.missing.pop(name, None)

    def held_in(self, path: Path) -> list[str]:
        """List the sources known from the lock alone that this file is; going by content, which is read only where the size is right."""
        size = path.stat().st_size
        unseen = {name: facts for name, facts in self.facts.items() if name not in self.found and facts.blake3 and facts.size == size}
        tables = {name: SourceTable(path=str(path.resolve()), blake3=facts.blake3) for name, facts in unseen.items()}
        return list(find_sources([replace(self._wanted[name], table=table) for name, table in tables.items()], self._search)[0])

    def fetch(self) -> None:
        """Download what was ordered, and take it as found."""
        if not self.orders:
            return
        orders, self.orders = list(self.orders.values()), {}
        self._watcher.started(f"fetching {', '.join(order.name for order in orders)}", sum(self.missing.values()))
        try:
            arrived = self._remote().fetch(orders, self._store.stock, self._store.memo, self._watcher.advanced)
        finally:
            self._watcher.finished()
        sought = []
        for name, result in arrived.items():
            if isinstance(result, UnreachableError):
                self.errors[name] = self._unreachable(name, result)
            elif isinstance(result, SdbuildError):
                self.errors[name] = result
            else:
                pinned = self._pinned(name)
                sought.append(replace(pinned, table=pinned.table.model_copy(update={"path": str(result.resolve())})))
        found, errors = find_sources(sought, self._search)
        self.errors |= errors
        for name, file in found.items():
            is_bundle = bool(file.original and self._store.stock.drop_bundle(file.original.parent))
            self._take(name, replace(file, original=None) if is_bundle else file)
            del self.missing[name]

    def _unreachable(self, name: str, failure: UnreachableError) -> UnreachableError:
        """Add to why nobody answers how the file can be had otherwise."""
        first, absent = failure.issues[0], self._absent[name].issues[0]
        reason = first.what.removeprefix(f"source `{name}`: ")
        return UnreachableError(replace(first, what=f"{absent.what}, and {reason}", hint=f"{first.hint}; {absent.hint}"))

    def _valid_entries(self) -> dict[str, Entry]:
        """Choose the entries of the lock that speak of what the recipes say today; with `locked`, any other is a mistake."""
        entries, issues = {}, []
        for name, wanted in self._wanted.items():
            entry = self._lock.entries.get(name)
            differences = list(entry.differences(wanted.table)) if entry else ["it is not there"] * self._reach.locked
            if entry and not differences:
                entries[name] = entry
            elif differences:
                what = f"source `{name}` is not as {self._lock.path.name} says: {'; '.join(differences)}"
                issues.append(Issue(where=wanted.where, what=what, hint=self._relock))
        known = {full for prefix, recipe in self._plan.tables() for full in (prefix + name for name in recipe.table.source)}
        strays = [name for name in self._lock.entries if name not in known]
        issues += [Issue(where=str(self._lock.path), what=f"has source `{name}`, which no recipe has", hint=self._relock) for name in strays]
        if self._reach.locked and not self._lock.exists:
            issues = [Issue(where=str(self._lock.path), what="there is no lock, and --locked asks for one", hint=self._relock)]
        if issues and self._reach.locked:
            raise RecipeError(*issues)
        for issue in issues[:_MOST_NOTES]:
            self._watcher.note(f"{issue.where}: {issue.what}; {issue.hint}")
        if len(issues) > _MOST_NOTES:
            self._watcher.note(f"{self._lock.path}: differs in {len(issues) - _MOST_NOTES} more sources")
        return entries

    def _pinned(self, name: str) -> Wanted:
        """Add to what the recipe says of a source what the lock knows of its bytes."""
        wanted, entry = self._wanted[name], self._entries.get(name)
        if entry is None or wanted.local:
            return wanted
        if entry.made and (place := made_place(self._store.stock, entry.made, entry.kind)).exists():
            return replace(wanted, made=(place, entry.kind, entry.size))
        if not entry.blake3:
            return wanted
        table = wanted.table
        pins: dict[str, Any] = {"size": entry.size}
        if self._reach.locked or not (table.sha256 or table.blake3):
            pins["blake3"] = entry.blake3
        if self._reach.locked and entry.sha256:  # the blake3 would do, but then nobody would notice an edited sha256
            pins["sha256"] = entry.sha256
        return replace(wanted, table=table.model_copy(update=pins))

    def _take(self, name: str, file: Found) -> None:
        """Take a file for a source, if it holds what the lock says."""
        entry, wanted = self._entries.get(name), self._wanted[name]
        facts = Facts.of(file, entry)
        if entry and (changes := list(Facts.locked(entry).changes(facts))):
            what = f"source `{name}`: {file.original or file.path} is not as {self._lock.path.name} says: {'; '.join(changes)}"
            issue = Issue(where=wanted.where, what=what, hint=self._relock)
            if self._reach.locked or not wanted.local:
                self.errors[name] = IntegrityError(issue)
                return
            self._watcher.note(f"{issue.where}: {issue.what}")
            facts = replace(facts, terms={})  # the hub spoke of another file
        table = wanted.table
        if table.uri and not (entry or table.sha256 or table.blake3 or self._search.learns_all):
            what = f"source `{name}` is taken as it is: nothing pins that {(file.original or file.path).name} is {table.uri}"
            self._watcher.note(f"{wanted.where}: {what}")
        self.found[name], self.facts[name], self.headers[name] = file, facts, file.header

    def _order(self, name: str, error: SdbuildError, *, is_plan: bool) -> None:
        """Order one source, or raise why it is not to be had."""
        wanted, entry = self._pinned(name), self._entries.get(name)
        table, uri = wanted.table, wanted.table.uri or ""
        if self._reach.offline:
            if is_plan and entry:
                self.missing[name] = entry.size
                return
            first, *others = error.issues
            self.errors[name] = SourceError(replace(first, what=f"{first.what}, and --offline forbids asking for it"), *others)
            return
        for issue in error.issues[1:]:
            self._watcher.note(f"{issue.where}: {issue.what}")
        hubs = self._remote()
        offer = self.offers.get(name) or (hubs.locked_offer(entry) if entry and entry.address and not entry.made else None)
        if entry and entry.made:
            uri = f"{uri.rpartition('@')[0]}@{entry.revision}" if entry.revision else uri
        offer = offer or hubs.offer(name, wanted.where, uri, table, with_terms=False)
        if not (table.sha256 or table.blake3 or self._search.learns_all or (entry and entry.made)):
            raise self._unpinned(wanted, offer)
        if offer.parts and (pins := [pin for pin in ("size", "sha256", "blake3") if getattr(self._wanted[name].table, pin) is not None]):
            raise several_files(wanted, pins)
        order = hubs.order(wanted, offer, learns_all=self._search.learns_all)
        try:
            header, size = hubs.peek(order)
        except UnreachableError:
            if not (is_plan and entry):
                raise
            header, size = None, entry.size  # the lock knows enough for a plan
        if header:
            self.headers[name] = header
        self.orders[name] = replace(order, offer=replace(offer, size=size or offer.size))
        self.missing[name] = size or offer.size or 0

    def _unpinned(self, wanted: Wanted, offer: Offer) -> RecipeError:
        """Refuse to download what nobody has pinned, with the line that pins it."""
        pin = next((f'`{name} = "{said}"`' for name in ("sha256", "blake3") if (said := getattr(offer, name))), "")
        command = f"run `sdbuild lock {self._plan.recipe.path}`"
        advice = f"write {pin}, which is what {offer.page or 'the hub'} says today, or {command}" if pin else f"{command}, which notes what it is"
        what = f"source `{wanted.name}` is to be downloaded, and nothing pins what it must be"
        return RecipeError(Issue(where=wanted.where, what=what, hint=advice))

    def _remote(self) -> Hubs:
        """Return the way out; made, and httpx loaded, when it is first needed."""
        if self._hubs is None:
            from sdmerge_build.sources.remote import Hubs  # noqa: PLC0415  a build that asks nobody loads no client

            self._hubs = Hubs(allow_private=self._reach.allow_private)
        return self._hubs


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk below `folder` cannot hold."""
    if (free := free_space(folder)) < needed:
        what = f"no space left: {readable_size(needed)} are needed, {readable_size(free)} are free"
        raise SpaceError(Issue(where=str(folder), what=what, hint="free some space, or use another disk with --store and --out"))
