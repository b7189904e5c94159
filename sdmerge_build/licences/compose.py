"""Owns the conclusion over a whole ancestry: the terms that bind a result, what each rests on, what collides, and what must be done.

Has never heard of recipes, files or manifests, and never says that anybody may do anything: it says what the texts say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdmerge_build.licences.ancestors import Ancestor, Binding, Conflict, Duty, Layer, Reason, bindings, reason
from sdmerge_build.licences.conflicts import conflicts, declared_conflicts
from sdmerge_build.licences.duties import duties
from sdmerge_build.licences.terms import COMPONENTS, HOSTS, LADDERS, PERMISSIVE, Terms, meet_all, tightened
from sdmerge_build.licences.words import in_words

__all__ = ["ADVICE", "POLICIES", "Conclusion", "conclude"]

ADVICE = "This is what the texts say, not legal advice."
POLICIES = ("strict", "minimal")
_IN_WORDS = {
    "C1": "a copyleft text meets limits",
    "C2": "a copyleft text meets restrictions of use",
    "C3": "a parent's derivatives must not be shared",
    "C4": "two copyleft texts exclude each other",
    "C5": "permissions of merges must be the same",
    "C6": "a text that cannot be sublicensed meets copyleft",
    "C7": "the declared licence is looser",
    "C8": "not all terms are known",
    "C9": "foundation weights of another family",
}
_KEPT = ("share_derivative", "hosting", "status")  # where sharing itself is refused, there is no sharing with other permissions
_OF_A_LICENCE = tuple(
    name for name in COMPONENTS if name not in {"credit", "notices", "license_copies", "branding", "change_notice", "source_offer", "status"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """What the texts say about a result; `license` is an id, or several joined by AND, and empty where none is known."""

    terms: Terms
    license: str
    license_title: str
    reasons: tuple[Reason, ...]
    conflicts: tuple[Conflict, ...]
    duties: tuple[Duty, ...]
    ancestors: tuple[Ancestor, ...]
    policy: str
    dropped: tuple[Reason, ...] = ()  # authors' flags that the policy "minimal" left out

    @property
    def share(self) -> str:
        """Return "no" on any conflict, the unknown included, and "on-terms" otherwise."""
        return "no" if any(conflict.level == "conflict" for conflict in self.conflicts) else "on-terms"

    @property
    def summary(self) -> str:
        """Sum the conclusion up in one line."""
        said = [self.license_title or "no licence is known"]
        if self.share == "no":
            reasons = dict.fromkeys(f"{_IN_WORDS[c.id]} ({c.id})" for c in self.conflicts if c.level == "conflict")
            said.append(f"not to be shared: {', '.join(reasons)}")
        if self.terms.weights_commercial != "free":
            said.append(f"commercial use: {self.terms.weights_commercial}")
        if self.terms.outputs_commercial != "free":
            said.append(f"commercial use of images: {in_words(self.terms.outputs_commercial)}")
        if not (self.terms.sell_merge and self.terms.sell_model):
            said.append("selling is withheld")
        if self.terms.hosting != HOSTS:
            said.append(f"to be run for others by: {in_words(sorted(self.terms.hosting))}")
        if self.terms.status != "known":
            said.append(f"partly {self.terms.status}")
        return "; ".join(said)

    def table(self) -> dict[str, Any]:
        """Write the conclusion as the `[terms]` table of a manifest: texts, truths, lists and tables, in an order that is always the same."""
        table: dict[str, Any] = {
            "share": self.share,
            "policy": self.policy,
            "license": self.license,
            "license_title": self.license_title,
            "status": self.terms.status,
            "summary": self.summary,
            "advice": ADVICE,
            "concluded": {name: value for name, value in self.terms.plain().items() if name != "status"},
            "reason": [_reason_row(entry) for entry in self.reasons],
            "conflict": [_conflict_row(conflict) for conflict in self.conflicts],
            "duty": [dataclasses.asdict(duty) | {"ancestors": list(duty.ancestors)} for duty in self.duties],
            "ancestor": [_ancestor_row(ancestor) for ancestor in self.ancestors],
        }
        return table | ({"dropped": [_reason_row(entry) for entry in self.dropped]} if self.dropped else {})


def conclude(ancestors: Iterable[Ancestor], *, declared: str | None = None, policy: str = "strict") -> Conclusion:
    """Combine the terms of every ancestor that contributes; neither their order nor their repetition counts.

    `declared` is a licence as a person wrote it; a looser one than concluded is conflict C7, and so is one that is not known.
    `policy` is "strict", or "minimal": authors' own flags are dropped where they allow other permissions on merges.
    """
    if policy not in POLICIES:
        raise ValueError(f"`{policy}` is no policy")
    listed = _sorted(ancestors)
    dropped: list[Reason] = []
    if policy == "minimal":
        listed = [_without_flags(ancestor, dropped) for ancestor in listed]
    sharing = [ancestor for ancestor in listed if ancestor.contributes]
    terms = meet_all(ancestor.terms for ancestor in sharing)
    collided = conflicts(sharing, terms)
    if declared is not None:
        collided = tuple(sorted((*collided, *declared_conflicts(declared, sharing, terms)), key=lambda conflict: (conflict.id, conflict.what)))
    binding = _binding_licences(sharing)
    return Conclusion(
        terms=terms,
        license=" AND ".join(layer.id for layer in binding),
        license_title=" AND ".join(dict.fromkeys(layer.title for layer in binding)),
        reasons=_reasons(sharing, terms),
        conflicts=collided,
        duties=duties(sharing),
        ancestors=tuple(listed),
        policy=policy,
        dropped=tuple(dropped),
    )


def _sorted(ancestors: Iterable[Ancestor]) -> list[Ancestor]:
    """Name each ancestor once; one that contributes anywhere contributes."""
    found: dict[Ancestor, bool] = {}
    for ancestor in ancestors:
        same = dataclasses.replace(ancestor, contributes=True)
        found[same] = found.get(same, False) or ancestor.contributes
    return sorted((dataclasses.replace(same, contributes=contributes) for same, contributes in found.items()), key=_order)


def _order(ancestor: Ancestor) -> tuple[Any, ...]:
    layers = [
        (layer.title, layer.id, layer.url, layer.source, str(layer.terms.plain()), str(sorted(layer.clauses.items()))) for layer in ancestor.layers
    ]
    texts = (ancestor.credit, ancestor.homepage, ancestor.family, *ancestor.notes)
    return ancestor.name, ancestor.claimed_by, not ancestor.contributes, layers, texts


def _without_flags(ancestor: Ancestor, dropped: list[Reason]) -> Ancestor:
    """Drop an author's flags where they say that a merge may have other permissions, and say which."""
    layers: list[Layer] = []
    notes = list(ancestor.notes)
    for layer in ancestor.layers:
        flags = [name for name in layer.terms.stricter() if name not in _KEPT or (name == "hosting" and layer.terms.share_derivative)]
        if not (layer.is_permissions and layer.terms.relicense == "any" and layer.terms.status != "unknown" and flags):
            layers.append(layer)
            continue
        layers.append(dataclasses.replace(layer, terms=dataclasses.replace(layer.terms, **{name: getattr(PERMISSIVE, name) for name in flags})))
        if ancestor.contributes:
            dropped += [reason(name, (ancestor, layer)) for name in flags]
            notes.append(f"policy minimal leaves out its author's own flags: {', '.join(flags)}")
    return dataclasses.replace(ancestor, layers=tuple(layers), notes=tuple(notes))


def _reasons(ancestors: Sequence[Ancestor], terms: Terms) -> tuple[Reason, ...]:
    found = [reason(name, binding) for name in terms.stricter() for binding in bindings(ancestors) if _decides(name, binding, terms)]
    for ancestor in ancestors:
        said, doubt = ancestor.terms.status, ancestor.contradiction
        if said == terms.status != "known" and not any(layer.terms.status == said for layer in ancestor.layers):
            found.append(Reason(component="status", value=said, ancestor=ancestor.name, layer="", clause=doubt or "no terms are known", url=""))
    return tuple(dict.fromkeys(found))


def _decides(name: str, binding: Binding, terms: Terms) -> bool:
    """Tell whether the concluded value of a component rests on this text: on the strictest of steps, on every member of sets."""
    value, concluded = getattr(binding[1].terms, name), getattr(terms, name)
    if value == getattr(PERMISSIVE, name):
        return False
    by_step = name in LADDERS or concluded == "non-commercial"
    return bool(value == concluded) if by_step else True


def _binding_licences(ancestors: Sequence[Ancestor]) -> list[Layer]:
    """Find the texts that the result comes under: those that no other one satisfies by being stricter in everything, permissions beside them."""
    known = {layer.id: layer for _, layer in bindings(ancestors) if layer.id}
    texts = [layer for layer in known.values() if not layer.is_permissions]
    left = [layer for layer in texts if not any(_absorbs(other, layer) for other in texts)]
    flags = [layer for layer in known.values() if layer.is_permissions and tightened(PERMISSIVE, layer.terms, COMPONENTS[:-1])]
    return sorted(left, key=lambda layer: layer.id) + sorted(flags, key=lambda layer: layer.id)


def _absorbs(other: Layer, layer: Layer) -> bool:
    """Tell whether a derivative under `other` satisfies `layer`, which lets derivatives come under other texts."""
    if layer.terms.relicense not in {"any", "respect-use-restrictions"} or tightened(other.terms, layer.terms, _OF_A_LICENCE):
        return False
    return bool(tightened(layer.terms, other.terms, _OF_A_LICENCE)) or (
        not tightened(PERMISSIVE, layer.terms, COMPONENTS[:-1]) and bool(tightened(PERMISSIVE, other.terms, COMPONENTS[:-1]))
    )


def _reason_row(entry: Reason) -> dict[str, str]:
    return {
        "component": entry.component,
        "value": entry.value,
        "ancestor": entry.ancestor,
        "license": entry.layer,
        "clause": entry.clause,
        "url": entry.url,
    }


def _conflict_row(conflict: Conflict) -> dict[str, Any]:
    return {
        "id": conflict.id,
        "level": conflict.level,
        "what": conflict.what,
        "ancestors": list(conflict.ancestors),
        "rests_on": list(dict.fromkeys(f"{entry.ancestor}: {entry.layer}, {entry.clause}" for entry in conflict.reasons)),
        "hint": conflict.hint,
    }


def _ancestor_row(ancestor: Ancestor) -> dict[str, Any]:
    base = next((layer for layer in ancestor.layers if not layer.is_permissions), None)
    row: Mapping[str, Any] = {
        "name": ancestor.name,
        "contributes": ancestor.contributes,
        "status": ancestor.terms.status,
        "license": base.id if base else "",
        "license_title": base.title if base else "",
        "license_url": base.url if base else "",
        "credit": ancestor.credit,
        "homepage": ancestor.homepage,
        "claimed_by": ancestor.claimed_by,
        "notes": [*ancestor.notes, *([ancestor.contradiction] if ancestor.contradiction else [])],
        "layer": [{name: text for name in ("title", "id", "url", "source") if (text := getattr(layer, name))} for layer in ancestor.layers],
    }
    return {name: value for name, value in row.items() if value not in ("", [])}
