"""Owns what must be done when a result is shared: credits, notices, copies, statements of change, offers of source, and the rest.

Has never heard of conflicts; a duty stands whether or not the texts can be satisfied together.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdmerge_build.licences.ancestors import Ancestor, Duty, Layer, bindings
from sdmerge_build.licences.catalog import licence_named

__all__ = ["KINDS", "duties"]

KINDS = {
    "credit": "credit",
    "notices": "notice",
    "license_copies": "licence-copy",
    "change_notice": "change-notice",
    "source_offer": "source-offer",
    "branding": "branding",
    "filters": "filter",
    "use_restrictions": "pass-on",
}
"""The components that ask for a deed, and the kind of duty each makes."""


def duties(ancestors: Iterable[Ancestor]) -> tuple[Duty, ...]:
    """List what the texts of contributing ancestors ask for; the same deed for several ancestors is one duty. Sorted by kind and text."""
    asked: dict[tuple[str, str, str], dict[str, None]] = {}
    for ancestor, layer in bindings(ancestors):
        for component, kind in KINDS.items():
            members = getattr(layer.terms, component)
            for what, url in _deeds(component, sorted(members), ancestor, layer):
                asked.setdefault((kind, what, url), {})[ancestor.name] = None
    return tuple(Duty(kind=kind, what=what, ancestors=tuple(sorted(names)), url=url) for (kind, what, url), names in sorted(asked.items()))


def _deeds(component: str, members: list[str], ancestor: Ancestor, layer: Layer) -> Iterable[tuple[str, str]]:
    """Say what is to be done for one component of one text, each with an address."""
    if component == "use_restrictions":
        return [(f"pass on the use restrictions of {layer.title} as an enforceable provision", layer.url)] if members else []
    if component == "license_copies":
        return [_copy(member, layer) for member in members]
    if component == "credit":
        return [(_credit(member, ancestor), ancestor.homepage or layer.url) for member in members]
    return [(member, layer.url) for member in members]


def _copy(identifier: str, layer: Layer) -> tuple[str, str]:
    licence = licence_named(identifier)
    title, url = (licence.title, licence.url) if licence else (layer.title, layer.url)
    return f"pass on a copy of {title}", url


def _credit(member: str, ancestor: Ancestor) -> str:
    known = ", ".join(text for text in (ancestor.credit, ancestor.homepage) if text and text not in member)
    return f"credit {ancestor.name}: {member}" + (f" ({known})" if known else "")
