"""Owns the conflicts C1 to C9: texts that cannot be satisfied together, each with the clauses that collide.

Has never heard of single licences by name: it sees components of terms, and asks of each copyleft text whether others ask for more than it does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from sdmerge_build.errors import named_briefly
from sdmerge_build.licences.ancestors import LIMITS, Ancestor, Binding, Conflict, Reason, bindings, reason
from sdmerge_build.licences.catalog import licence_named, nearest_licences
from sdmerge_build.licences.terms import Terms, meet_all, tightened

__all__ = ["conflicts", "declared_conflicts"]

GPL = "GPL-3.0"
RAIL = "rail"  # identifiers of use restrictions of every RAIL text begin like this
FOUNDATION = "sai:foundation"
_FLAGS = ("outputs_commercial", "hosting", "sell_model", "sell_merge", "share_derivative")
_DECLARABLE = ("use_restrictions", *LIMITS, "share_derivative", "copyleft", "filters")
ASSERT = (
    "say in the recipe what is missing: `license`, for Civitai `permissions`, and `evidence = { url = …, date = … }` for both; "
    "or let `sdbuild lock` ask the hub"
)


def conflicts(ancestors: Sequence[Ancestor], terms: Terms) -> tuple[Conflict, ...]:
    """Find what collides among contributing ancestors, whose terms together are `terms`; sorted by id. Linear in the number of ancestors."""
    rules = (_copyleft, _sharing, _families, _same_permissions, _sublicensing, _unknown, _foundation)
    found = (conflict for rule in rules for conflict in rule(ancestors, terms))
    return tuple(sorted(found, key=lambda conflict: (conflict.id, conflict.what)))


def declared_conflicts(declared: str, ancestors: Sequence[Ancestor], terms: Terms) -> Iterator[Conflict]:
    """C7: compare a declared licence, or several joined by AND, with what is concluded; also when it is not known at all."""
    own: dict[str, Terms] = {}
    for _, layer in bindings(ancestors):
        for name in {layer.id, layer.title} if layer.id else ():
            own[name] = meet_all([own.get(name, layer.terms), layer.terms])
    parts: list[Terms] = []
    for name in re.split(r"\s+AND\s+", declared.strip("() ")):
        licence = licence_named(name)
        if licence is None and name not in own:
            what = f"the declared licence `{name[:80]}` is not known, so it cannot be compared with what the ancestors' texts say"
            yield Conflict(id="C7", level="conflict", what=what, hint=nearest_licences(name))
            return
        parts.append(own[name] if licence is None else licence.terms)
    together = meet_all(parts)
    looser = tightened(together, terms, _DECLARABLE)
    if terms.relicense in {"same-licence", "no-sublicense"}:  # lower steps are about use restrictions and flags, which are compared by themselves
        looser += tightened(together, terms, ["relicense"])
    if looser:
        collided = [(name, binding) for name in looser for binding in bindings(ancestors) if tightened(together, binding[1].terms, [name])]
        yield _conflict(
            "C7",
            f"the declared licence `{declared[:80]}` is looser than what the ancestors' texts say: {_words(looser)}",
            collided,
            hint="declare nothing, or what `sdbuild license` concludes",
        )


def _copyleft(ancestors: Sequence[Ancestor], _terms: Terms) -> Iterator[Conflict]:
    """C1 and C2: a text whose derivatives must be allowed all that it allows, and another that allows less."""
    every = bindings(ancestors)
    for holders in _copyleft_texts(every):
        title, base = holders[0][1].title, holders[0][1].terms
        others = [binding for binding in every if any(holder is not binding[0] for holder, _ in holders)]
        limited = [(name, binding) for binding in others for name in tightened(base, binding[1].terms, LIMITS)]
        restricted = [("use_restrictions", binding) for binding in every if _rail(binding[1].terms) - base.use_restrictions]
        clauses = [("relicense", holder) for holder in holders]
        if limited and GPL not in base.copyleft:
            what = f"{title} must be passed on with all that it allows, and other ancestors allow less: {_words(name for name, _ in limited)}"
            yield _conflict("C1", what, clauses + limited, "no licence satisfies both: replace one of them, or keep the result private")
        if restricted or (limited and GPL in base.copyleft):
            further = restricted + (limited if GPL in base.copyleft else [])
            what = f"{title} allows no further restrictions, and other texts add some: {_words(name for name, _ in further)}"
            yield _conflict("C2", what, clauses + further, "no licence satisfies both: replace one of them, or keep the result private")


def _sharing(ancestors: Sequence[Ancestor], _terms: Terms) -> Iterator[Conflict]:
    refusing = [("share_derivative", binding) for binding in bindings(ancestors) if not binding[1].terms.share_derivative]
    if refusing:
        yield _conflict("C3", "a merge of these may be made privately, and not shared", refusing, "ask the author, or replace the ancestor")


def _families(ancestors: Sequence[Ancestor], terms: Terms) -> Iterator[Conflict]:
    if len(terms.copyleft) > 1:
        what = f"each of these asks that the result comes under it alone: {', '.join(sorted(terms.copyleft))}"
        held = [("copyleft", binding) for binding in bindings(ancestors) if binding[1].terms.copyleft]
        yield _conflict("C4", what, held, "no licence satisfies both: replace one of them, or keep the result private")


def _same_permissions(ancestors: Sequence[Ancestor], terms: Terms) -> Iterator[Conflict]:
    differing: list[tuple[str, Binding]] = []
    names: set[str] = set()
    for ancestor in ancestors:
        own = ancestor.terms
        changed = {name for name in _FLAGS if getattr(own, name) != getattr(terms, name)}
        changed |= {"credit"} if bool(own.credit) != bool(terms.credit) else set()
        held = [("relicense", (ancestor, layer)) for layer in ancestor.layers if layer.terms.relicense == "same-permissions"]
        if held and changed:
            differing += held
            names |= changed
    if differing:
        what = (
            f"the same permissions are asked of merges, and the others' texts add limits ({_words(names)}): read as the clause, this holds, "
            "for nothing is modified or eliminated; read as the badge, `same permissions required on merges`, it does not"
        )
        yield _conflict("C5", what, differing, "ask the author which reading is meant", level="warning")


def _sublicensing(ancestors: Sequence[Ancestor], terms: Terms) -> Iterator[Conflict]:
    if terms.copyleft and terms.relicense == "no-sublicense":
        held = [("copyleft", binding) for binding in bindings(ancestors) if binding[1].terms.copyleft]
        direct = [("relicense", binding) for binding in bindings(ancestors) if binding[1].terms.relicense == "no-sublicense"]
        what = "one text asks that the result comes under it, and another grants its rights directly and lets nobody pass them on"
        yield _conflict("C6", what, held + direct, "no licence satisfies both: replace one of them, or keep the result private")


def _unknown(ancestors: Sequence[Ancestor], _terms: Terms) -> Iterator[Conflict]:
    unknown = [ancestor for ancestor in ancestors if ancestor.terms.status == "unknown"]
    if not ancestors:
        yield Conflict(id="C8", level="conflict", what="no ancestor contributes, so nothing is known of the terms")
    elif unknown:
        names = tuple(dict.fromkeys(ancestor.name for ancestor in unknown))
        reasons = tuple(reason("status", binding) for binding in bindings(unknown) if binding[1].terms.status == "unknown")
        what = f"the terms of {named_briefly(names)} are not known, so nothing can be concluded"
        yield Conflict(id="C8", level="conflict", what=what, ancestors=names, reasons=reasons, hint=ASSERT)


def _foundation(ancestors: Sequence[Ancestor], _terms: Terms) -> Iterator[Conflict]:
    families = {ancestor.family for ancestor in ancestors} - {""}
    held = [binding for binding in bindings(ancestors) if FOUNDATION in binding[1].terms.use_restrictions]
    if crossed := [("use_restrictions", binding) for binding in held if binding[0].family and families - {binding[0].family}]:
        what = f"one text forbids improving other foundation models, and weights of several families are merged: {', '.join(sorted(families))}"
        yield _conflict("C9", what, crossed, "ask whether the result counts as a derivative or as another model", level="warning")


def _copyleft_texts(every: Iterable[Binding]) -> Iterable[list[Binding]]:
    """Group the copyleft texts by what they are and ask, whoever they bind and whoever says so."""
    found: dict[tuple[str, Terms], list[Binding]] = {}
    for ancestor, layer in every:
        if layer.terms.copyleft:
            found.setdefault((layer.title, dataclasses.replace(layer.terms, status="known")), []).append((ancestor, layer))
    return found.values()


def _rail(terms: Terms) -> set[str]:
    return {clause for clause in terms.use_restrictions if clause.startswith(RAIL)}


def _words(components: Iterable[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in sorted(set(components)))


def _conflict(which: str, what: str, rests_on: Iterable[tuple[str, Binding]], hint: str, *, level: str = "conflict") -> Conflict:
    """Write down a conflict; each ancestor and each reason is named once, in the ancestors' order."""
    reasons: dict[Reason, None] = {}
    names: dict[str, None] = {}
    for component, binding in rests_on:
        reasons[reason(component, binding)] = None
        names[binding[0].name] = None
    return Conflict(id=which, level=level, what=what, ancestors=tuple(sorted(names)), reasons=tuple(reasons), hint=hint)
