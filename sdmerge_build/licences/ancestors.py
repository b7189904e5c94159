"""Owns the words of a conclusion: which texts bind which ancestor, and what follows from them.

Has never heard of how ancestors combine, nor of where they were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sdmerge_build.licences.catalog import Licence
from sdmerge_build.licences.permissions import ATTACHMENT_B, Permissions
from sdmerge_build.licences.terms import COMPONENTS, UNKNOWN, Terms, meet, meet_all, plain, tightened

__all__ = [
    "LIMITS",
    "Ancestor",
    "Binding",
    "Conflict",
    "Duty",
    "Layer",
    "Reason",
    "bindings",
    "licence_layer",
    "permissions_layer",
    "reason",
    "unknown_layer",
]

LIMITS = ("weights_commercial", "outputs_commercial", "hosting", "sell_model", "sell_merge", "territory")
"""What a copyleft text that must pass on all it allows cannot be combined with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One text that binds an ancestor: its base licence, or its author's permissions."""

    title: str
    id: str = ""  # empty where no text is known
    url: str = ""
    terms: Terms
    clauses: Mapping[str, str] = field(default_factory=dict, hash=False)  # component of `terms` → what its value rests on
    source: str = "nobody"  # who says that this text applies

    @property
    def is_permissions(self) -> bool:
        """Tell whether these are an author's own flags, which supplement a licence."""
        return self.id.startswith(ATTACHMENT_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A checkpoint that a result was made of, and every text that binds it."""

    name: str
    layers: tuple[Layer, ...] = ()
    contributes: bool = True
    credit: str = ""
    homepage: str = ""
    family: str = ""  # of foundation weights: "flux", "sdxl", …
    claimed_by: str = ""  # the ancestor whose header names this one; empty for sources of the recipe
    notes: tuple[str, ...] = ()

    @property
    def terms(self) -> Terms:
        """Combine the texts that bind this ancestor alone; without any, nothing is known. Texts that contradict each other are disputed."""
        if not self.layers:
            return UNKNOWN
        together = meet_all(layer.terms for layer in self.layers)
        return meet(together, Terms(status="disputed")) if self.contradiction else together

    @property
    def contradiction(self) -> str:
        """Say which text of this ancestor forbids the limits that another one adds; empty where none does."""
        for layer in self.layers:
            for other in self.layers:
                if layer.terms.copyleft and tightened(layer.terms, other.terms, LIMITS):
                    return f"limits beside {layer.title}, which allows none to be added: {other.title}"
        return ""


Binding = tuple[Ancestor, Layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """What one component of a conclusion rests on."""

    component: str
    value: str
    ancestor: str
    layer: str  # its title
    clause: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Texts that cannot be satisfied together (`level` "conflict"), or only in one of two readings ("warning")."""

    id: str  # C1 … C9
    level: str
    what: str
    ancestors: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """What whoever shares the result must do: credit, notice, licence-copy, change-notice, source-offer, branding, filter or pass-on."""

    kind: str
    what: str
    ancestors: tuple[str, ...]
    url: str


def licence_layer(licence: Licence, *, source: str, status: str = "known") -> Layer:
    """Make a layer of a licence that somebody says applies; `status` is how far that is to be believed."""
    terms = meet(licence.terms, Terms(status=status))
    return Layer(title=licence.title, id=licence.id, url=licence.url, terms=terms, clauses=licence.clauses, source=source)


def permissions_layer(permissions: Permissions, *, source: str, status: str = "known", credit: str = "", url: str = "") -> Layer:
    """Make a layer of an author's permissions; `url` is the page that shows them."""
    terms = meet(permissions.terms(credit), Terms(status=status))
    return Layer(title=permissions.title, id=permissions.id, url=url, terms=terms, clauses=permissions.clauses, source=source)


def unknown_layer(title: str, *, source: str = "nobody", url: str = "") -> Layer:
    """Make a layer of a text that is named and not known; it permits nothing, for it concludes nothing."""
    return Layer(title=title, url=url, terms=UNKNOWN, clauses={"status": "no known text"}, source=source)


def bindings(ancestors: Iterable[Ancestor]) -> list[Binding]:
    """List every text with the ancestor that it binds."""
    return [(ancestor, layer) for ancestor in ancestors for layer in ancestor.layers]


def reason(component: str, binding: Binding) -> Reason:
    """Write down what one text contributes to one component."""
    assert component in COMPONENTS
    ancestor, layer = binding
    value = plain(getattr(layer.terms, component))
    if isinstance(value, bool):
        value = "yes" if value else "no"
    text = value if isinstance(value, str) else ", ".join(value)
    clause = layer.clauses.get(component, f"said by {layer.source}" if component == "status" else "")
    return Reason(component=component, value=text, ancestor=ancestor.name, layer=layer.title, clause=clause, url=layer.url)
