"""Owns who says what of one source's terms: its recipe, a hub, its own header; and what of it is handed on to whoever inherits it.

Has never heard of plans or artifacts. Nothing that anybody says is dropped because somebody else says more: what differs counts twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from sdmerge_build.claims import Claimed, Claims, read_claims
from sdmerge_build.licences import (
    FLAGS,
    PERMISSIVE,
    Layer,
    Licence,
    PermissionsError,
    Terms,
    licence_for_base_model,
    licence_layer,
    licence_named,
    meet_all,
    nearest_licences,
    permissions_layer,
    read_permissions,
    tightened,
    unknown_layer,
)
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources import page_of
from sdmerge_build.sources.uri import CivitaiAddress, UriError, parse_uri

__all__ = ["OF_PARENTS", "Parent", "Testimony", "claims_of", "credit_of", "licences_of", "permissions_of"]

RECIPE, HUB, HEADER, BASE_MODEL = "the recipe", "the hub", "its own header", "Civitai's table of base models"
PERMISSIONS = "permissions on Civitai"
OF_PARENTS = "parents"
"""The status of a row whose terms are those of other rows, which are named after it."""

_OF_PARENTS = Layer(title="the terms of its own parents", terms=replace(PERMISSIVE, status="claimed"), source=HEADER)
_SILENT = {"other", "unknown"}  # what cards say where they say nothing
_BINDING = ("use_restrictions", "weights_commercial", "outputs_commercial", "hosting", "share_derivative", "copyleft", "filters")
_HOSTS = ("civitai.com", "civitai.red", "civitai.green")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An ancestor that a source's header names, and what binds it."""

    claimed: Claimed
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]


@dataclass(slots=True)
class Testimony:
    """All that is said of one source's terms."""

    name: str
    table: SourceTable
    hub: Mapping[str, Any]
    claims: Claims
    layers: list[Layer] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # for lineages: each licence or table of permissions, and how far it is known
    notes: list[str] = field(default_factory=list)
    parents: list[Parent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.notes += self.claims.notes
        self.parents = [Parent(claimed=claimed, layers=layers, notes=notes) for claimed, (layers, notes) in _parents(self.claims)]
        self._hear_licences()
        self._hear_permissions()
        if self._is_incomplete and not self.table.evidence:
            self.notes.append("its header does not name all that it was made of")
            self._hear(unknown_layer("its whole lineage is not known", source=HEADER), {})

    @property
    def credit(self) -> str:
        """Name whom to credit."""
        return self.table.credit or credit_of(self.hub) or self.claims.author

    @property
    def family(self) -> str:
        """Name the foundation weights that a hub says it comes from: `SDXL` of `SDXL Turbo`; nothing where it says none."""
        return _text(self.hub.get("baseModel")).partition(" ")[0]

    @property
    def page(self) -> str:
        """Name the page that shows the source and its terms: as the recipe says it, or behind its address."""
        if self.table.homepage or not self.table.uri:
            return self.table.homepage or ""
        try:
            return page_of(self.table.uri)
        except UriError:
            return ""

    @property
    def _is_ours(self) -> bool:
        return any(claimed.said_in == "sdbuild.lineage" for claimed in self.claims.ancestors)

    @property
    def _is_incomplete(self) -> bool:
        return any(note.startswith(("`sdbuild.lineage`", "more ancestors")) for note in self.claims.notes)

    def _hear(self, layer: Layer, row: Mapping[str, Any]) -> None:
        self.layers.append(layer)
        self.rows.append({**row, "status": layer.terms.status})

    def _hear_licences(self) -> None:
        """Hear each licence that somebody names; where they do not agree, all count."""
        said = list(self._said())
        ours = licence_named(self.table.license or "")
        sets = {frozenset(licence.id for licence in _joined(text)) for text, _ in said} - {frozenset()}
        named = frozenset().union(*sets)
        hint = licence_for_base_model(_text(self.hub.get("baseModel")))
        if ours:
            self._hear(self._of_recipe(ours, said, hint), {"license": ours.id})
        for text, by in said:
            if by != RECIPE or not ours:
                self._hear_licence(text, by, is_alone=len(sets) < 2)
        if not said and hint:
            self._hear(licence_layer(hint, source=BASE_MODEL, status="claimed"), {"license": hint.id})
        elif hint and hint.id not in named and _adds_to(hint, self.layers):
            self.notes.append(f"{BASE_MODEL} says {hint.title}: both count")
            self._hear(licence_layer(hint, source=BASE_MODEL, status="disputed"), {"license": hint.id})
        if not self.layers and self._is_ours:
            self._hear(_OF_PARENTS, {})
            self.rows[-1]["status"] = OF_PARENTS
        elif not self.layers:
            self._hear(unknown_layer("no licence is said"), {})

    def _said(self) -> Iterator[tuple[str, str]]:
        """Yield who names which licence; `other` without a name, which says nothing, does not count beside evidence."""
        of_header = self.claims.license.removesuffix(f" AND {PERMISSIONS}") if self._is_ours else self.claims.license
        for text, by in ((self.table.license or "", RECIPE), *((text, HUB) for text in licences_of(self.hub)), (of_header, HEADER)):
            if text and not (text.casefold() in _SILENT and by != RECIPE and self.table.evidence):
                yield text, by

    def _hear_licence(self, text: str, by: str, *, is_alone: bool) -> None:
        """Hear what somebody names, beside what the recipe says."""
        status = "disputed" if not is_alone else "known" if by == HUB else "claimed"
        licences = _joined(text)
        ours = licence_named(self.table.license or "")
        for licence in licences:
            if not ours or licence.id != ours.id:
                if ours:
                    self.notes.append(f"{by} says {licence.title}, the recipe says {ours.title}: both count")
                self._hear(licence_layer(licence, source=by, status=status), {"license": licence.id})
        if not licences:
            advice = nearest_licences(text) if by == RECIPE else ""
            self.notes.append(f"`{text[:100]}`, as {by} says, is not a licence that is known" + (f"; {advice}" if advice else ""))
            unknown = unknown_layer(text, source=by)
            if by != RECIPE and self.table.evidence and ours:
                unknown = replace(unknown, terms=Terms(status="disputed"))
            self._hear(unknown, {"license": text})

    def _of_recipe(self, ours: Licence, said: list[tuple[str, str]], hint: Licence | None) -> Layer:
        """Judge what the recipe says: by its evidence, or by who else says so."""
        if self.table.evidence:
            return licence_layer(ours, source=f"{RECIPE}, with evidence: {self.table.evidence.url} on {self.table.evidence.date}")
        witnesses = {by for text, by in said if by != RECIPE and any(licence.id == ours.id for licence in _joined(text))}
        if HUB in witnesses:
            return licence_layer(ours, source=HUB)
        if witnesses or (hint and hint.id == ours.id):
            return licence_layer(ours, source=HEADER if witnesses else BASE_MODEL, status="claimed")
        self.notes.append("the recipe says its licence without evidence")
        return licence_layer(ours, source=f"{RECIPE}, without evidence", status="unknown")

    def _hear_permissions(self) -> None:
        """Hear what its author permits beside the licence, as hub and recipe say it."""
        hub, ours = permissions_of(self.hub), self.table.permissions
        if not hub and ours is None:
            if _is_on_civitai(self.table):
                self.notes.append("what its author permits on Civitai is not known")
                self._hear(unknown_layer(PERMISSIONS), {})
            return
        differs = bool(hub) and ours is not None and _parsed(hub) != _parsed(ours)
        if differs:
            self.notes.append("the hub's permissions are no longer those that the recipe says: both count")
        if hub:
            self._hear_flags(hub, HUB, "disputed" if differs else "known")
        if ours is not None and (differs or not hub):
            is_shown = self.table.evidence is not None
            by = f"{RECIPE}, with evidence" if is_shown else f"{RECIPE}, without evidence"
            self._hear_flags(ours, by, "disputed" if differs else "known" if is_shown else "unknown")

    def _hear_flags(self, raw: Mapping[str, Any], by: str, status: str) -> None:
        try:
            permissions = read_permissions(raw)
        except PermissionsError as error:
            self.notes.append(f"its permissions ({by}): {error}" + (f"; {error.hint}" if error.hint else ""))
            self._hear(unknown_layer(PERMISSIONS, source=by), {})
            return
        self.notes += permissions.notes
        credit = ", ".join(filter(None, (self.credit or self.name, self.page)))
        self._hear(permissions_layer(permissions, source=by, status=status, credit=credit, url=self.page), {"permissions": dict(raw)})


@functools.lru_cache(maxsize=1024)
def _claims_of(items: tuple[tuple[str, str], ...]) -> Claims:
    return read_claims(dict(items))


def claims_of(claims: Mapping[str, str]) -> Claims:
    """Read what a header claims, once in a run for each header."""
    return _claims_of(tuple(sorted(claims.items())))


def credit_of(hub: Mapping[str, Any]) -> str:
    """Name whom a hub names as the author."""
    model, creator = _text(hub.get("model")), _text(hub.get("creator")) or _text(hub.get("author"))
    return f"{model} by {creator}" if model and creator else model or creator


def permissions_of(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Take an author's flags from what a hub says."""
    return {key: hub[key] for key in FLAGS if key in hub}


def _of(claimed: Claimed, everybody: tuple[Claimed, ...]) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Return the terms that somebody's header gives for a parent; without any, whoever wrote the header answers for it.

    What was unknown or disputed when our own lineages were written stays so: nothing becomes better known by being merged.
    """
    notes: list[str] = []
    status = claimed.status if claimed.status in {"disputed", "unknown"} else "claimed"
    layers = [licence_layer(licence, source=HEADER, status=status) for licence in _joined(claimed.license)]
    if claimed.license and not layers:
        layers.append(unknown_layer(claimed.license, source=HEADER))
    if claimed.permissions:
        try:
            permissions = read_permissions(claimed.permissions)
        except PermissionsError as error:
            notes.append(f"its permissions: {error}")
            layers.append(unknown_layer(PERMISSIONS, source=HEADER))
        else:
            credit = ", ".join(filter(None, (claimed.credit or claimed.name, claimed.homepage)))
            layers.append(permissions_layer(permissions, source=HEADER, status=status, credit=credit, url=claimed.homepage))
    if not layers and claimed.status == OF_PARENTS and any(other.name.startswith(f"{claimed.name}: ") for other in everybody):
        layers.append(_OF_PARENTS)
    elif not layers and claimed.said_in == "sdbuild.lineage":
        layers.append(unknown_layer("no licence is said", source=HEADER))
    elif not layers:
        notes.append("its terms are not known; whoever made the file answers for them")
        layers.append(Layer(title="no terms are said", terms=replace(PERMISSIVE, status="claimed"), source=HEADER))
    return tuple(layers), tuple(notes)


def _parents(claims: Claims) -> Iterator[tuple[Claimed, tuple[tuple[Layer, ...], tuple[str, ...]]]]:
    yield from ((claimed, _of(claimed, claims.ancestors)) for claimed in claims.ancestors)


def _joined(text: str) -> list[Licence]:
    """Read a licence, or several joined by AND, as our own headers conclude them; none, unless all of them are known."""
    found = [licence_named(part) for part in text.split(" AND ")] if licence_named(text) is None else [licence_named(text)]
    return [licence for licence in found if licence] if all(found) else []


def _adds_to(hint: Licence, layers: list[Layer]) -> bool:
    """Tell whether what a base model comes under binds in ways that nobody has named."""
    return hint.terms.status == "disputed" or bool(tightened(meet_all(layer.terms for layer in layers), hint.terms, _BINDING))


def _parsed(raw: Mapping[str, Any]) -> Any:
    try:
        return read_permissions(raw)
    except PermissionsError:
        return raw


def _is_on_civitai(table: SourceTable) -> bool:
    """Tell whether a model's author may have set permissions: by its address, or by its page."""
    hosts = [urlsplit(url).hostname or "" for url in (table.uri or "", table.homepage or "") if url.startswith("http")]
    if any(host == ours or host.endswith(f".{ours}") for host in hosts for ours in _HOSTS):
        return True
    try:
        return isinstance(parse_uri(table.uri or ""), CivitaiAddress)
    except UriError:
        return False


def licences_of(hub: Mapping[str, Any]) -> list[str]:
    """List the licences that a card on Hugging Face states; where an id is `other`, its name says more."""
    said = hub.get("license")
    texts = [text for text in (said if isinstance(said, list) else [said]) if isinstance(text, str) and text]
    return [_text(hub.get("license_name")) or text if text == "other" else text for text in texts]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
