"""Owns what is done with sources alone: fetching them, and writing down in a lock what they are.

Has never heard of artifacts; nothing is built here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdmerge_build.check import check
from sdmerge_build.errors import IntegrityError, Issue, RecipeError, joined, printable
from sdmerge_build.events import Watcher
from sdmerge_build.facts import Facts
from sdmerge_build.lock import Entry, Lock, lock_path, read_lock, write_lock
from sdmerge_build.plan import Plan, plan_file
from sdmerge_build.sources import Found
from sdmerge_build.store import Store
from sdmerge_build.supply import Reach, Supply, refuse_full_disk

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
    plan = plan_file(path, locked=reach.locked)
    supply = Supply(plan, Store(store), read_lock(lock_path(path)), reach, watcher, lambda: None)
    supply.look()
    _raise(supply)
    downloaded = _gather(plan, supply, store)
    return {name: (supply.found[name], name in downloaded) for name in plan.sources}


def lock_sources(path: Path, store: Path, reach: Reach, watcher: Watcher) -> Locked:
    """Write down what every source of a recipe is today. Files are downloaded where they are not here: a lock vouches for their tensors."""
    plan, place = plan_file(path), lock_path(path)
    earlier = read_lock(place).entries
    known = {n: e for n, e in earlier.items() if reach.offline and e.uri and n in plan.sources and not any(e.differences(plan.sources[n]))}
    supply = Supply(plan, Store(store), Lock(path=place, exists=False, entries=known), reach, watcher, lambda: None, learns_all=True)
    if not reach.offline:
        supply.resolve(earlier)
        _raise(supply)
    supply.look()
    _raise(supply)
    _gather(plan, supply, store)
    _refuse_other_files(plan, supply)
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


def _refuse_other_files(plan: Plan, supply: Supply) -> None:
    """Refuse to lock a file of one's own under an address where another one lies: elsewhere, that one would be downloaded."""
    issues = []
    for name, offer in supply.offers.items():
        digests = [(field, getattr(supply.facts[name], field), getattr(offer, field)) for field in ("sha256", "blake3")]
        if wrong := [f"its {field} is {ours}, not {theirs}" for field, ours, theirs in digests if ours and theirs and ours != theirs]:
            path = supply.found[name].original or supply.found[name].path
            what = f"source `{name}`: {path} is not what {offer.page or offer.address} offers: {'; '.join(wrong)}"
            issues.append(Issue(where=plan.where("source", name), what=what, hint="leave out its `path`, or its `uri`"))
    if issues:
        raise IntegrityError(*issues)


def _entry(name: str, plan: Plan, supply: Supply, earlier: Entry | None) -> Entry:
    """Write down one source; offline, what a hub said earlier of the same bytes at the same address still stands."""
    table, facts, offer = plan.sources[name], supply.facts[name], supply.offers.get(name)
    still = earlier if earlier and table.uri and (earlier.uri, earlier.blake3) == (table.uri, facts.blake3) else None
    said = {key: getattr(of, key) for of in [offer or still] if of for key in ("address", "page", "revision", "filename", "terms")}
    return Entry(uri=table.uri or "", path=table.path or "", named=table.filename or "", **said, **_bytes_of(facts))


def _bytes_of(facts: Facts) -> dict[str, Any]:
    return {
        "tensor_digest": facts.tensors,
        "size": facts.size,
        "sha256": facts.sha256 or "",
        "blake3": facts.blake3 or "",
        "kind": facts.kind,
        "made": facts.made,
        "claims": dict(facts.claims),
    }


def _changes(was: Entry | None, now: Entry | None) -> list[str]:
    """Say what changed in an entry, field by field."""
    if was is None or now is None:
        return ["is new" if now else "is gone"]
    before, after = _flat(was), _flat(now)
    names = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    return [f"{name} = {_brief(before.get(name))} → {_brief(after.get(name))}" for name in names]


def _flat(entry: Entry) -> dict[str, Any]:
    """List the fields of an entry, and those of its tables: `terms.allowDerivatives`."""
    flat: dict[str, Any] = {}
    for name, value in ((f.name, getattr(entry, f.name)) for f in fields(entry)):
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value or None}
    return flat


def _brief(value: Any) -> str:
    text = "(none)" if value is None else printable(str(value))
    return text if len(text) <= 80 else f"{text[:77]}…"
