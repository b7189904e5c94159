"""Owns what is done with sources alone: fetching them, and writing down in a lock what they are.

Has never heard of artifacts; nothing is built here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdmerge_build.check import check
from sdmerge_build.errors import RecipeError, joined
from sdmerge_build.events import Watcher
from sdmerge_build.lock import Entry, Lock, lock_path, read_lock, write_lock
from sdmerge_build.plan import Plan, plan_file
from sdmerge_build.sources import Found
from sdmerge_build.store import Store
from sdmerge_build.supply import Facts, Reach, Supply, refuse_full_disk

__all__ = ["Locked", "fetch_sources", "lock_sources"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """What became of a lock: its entries, and what each says now that it did not say before."""

    path: Path
    entries: Mapping[str, Entry]
    changes: Mapping[str, list[str]]
    is_written: bool


def fetch_sources(path: Path, store: Path, reach: Reach, watcher: Watcher) -> dict[str, tuple[Found, bool]]:
    """See that every source of a recipe is on this machine, whole and verified; return each, and whether it was downloaded now."""
    plan = plan_file(path)
    supply = Supply(plan, Store(store), read_lock(lock_path(path)), reach, watcher, lambda: None)
    supply.look()
    _raise(supply)
    downloaded = _gather(plan, supply, store)
    return {name: (supply.found[name], name in downloaded) for name in plan.sources}


def lock_sources(path: Path, store: Path, reach: Reach, watcher: Watcher) -> Locked:
    """Write down what every source of a recipe is today. Files are downloaded where they are not here: a lock vouches for their tensors."""
    plan, place = plan_file(path), lock_path(path)
    earlier = read_lock(place).entries
    supply = Supply(plan, Store(store), Lock(path=place, exists=False, entries={}), reach, watcher, lambda: None, learns_all=True)
    if not reach.offline:
        supply.resolve()
        _raise(supply)
    supply.look()
    _raise(supply)
    _gather(plan, supply, store)
    entries = {name: _entry(name, plan, supply, earlier.get(name)) for name in plan.sources}
    changes = {name: list(_changes(earlier.get(name), entries.get(name))) for name in sorted({*earlier, *entries})}
    return Locked(path=place, entries=entries, changes=changes, is_written=write_lock(place, entries))


def _gather(plan: Plan, supply: Supply, store: Path) -> set[str]:
    """Find or download every source; headers and the disk are looked at before the first is downloaded."""
    supply.seek(plan.sources)
    supply.order(plan.sources, is_plan=False)
    _raise(supply)
    if issues := [issue for of in check(plan, supply.headers).issues.values() for issue in of] if supply.orders else []:
        raise RecipeError(*issues)
    refuse_full_disk(store, sum(supply.missing.values()))
    ordered = set(supply.orders)
    supply.fetch()
    _raise(supply)
    return ordered


def _raise(supply: Supply) -> None:
    if supply.errors:
        raise joined(list(supply.errors.values()))


def _entry(name: str, plan: Plan, supply: Supply, earlier: Entry | None) -> Entry:
    """Write down one source; offline, what a hub said earlier of the same address still stands."""
    table, facts, offer = plan.sources[name], supply.facts[name], supply.offers.get(name)
    said: dict[str, Any] = {}
    if offer:
        said = {key: getattr(offer, key) for key in ("address", "page", "revision", "filename", "terms")}
    elif earlier and table.uri and earlier.uri == table.uri:
        said = {key: getattr(earlier, key) for key in ("address", "page", "revision", "filename", "terms")}
    return Entry(uri=table.uri or "", path=table.path or "", **said, **_bytes_of(facts))


def _bytes_of(facts: Facts) -> dict[str, Any]:
    return {
        "tensor_digest": facts.tensors,
        "size": facts.size,
        "sha256": facts.sha256 or "",
        "blake3": facts.blake3 or "",
        "kind": facts.kind,
        "claims": dict(facts.claims),
    }


def _changes(was: Entry | None, now: Entry | None) -> list[str]:
    """Say what changed in an entry, field by field."""
    if was is None or now is None:
        return ["is new" if now else "is gone"]
    names = [f.name for f in fields(Entry) if getattr(was, f.name) != getattr(now, f.name)]
    return [f"{name} = {_brief(getattr(was, name))} → {_brief(getattr(now, name))}" for name in names]


def _brief(value: Any) -> str:
    text = str(value) if value else "(none)"
    return text if len(text) <= 80 else f"{text[:77]}…"
