"""Owns whose terms an artifact comes under: from plan, lock and headers to ancestors, each with the texts that bind it.

Has never heard of the store or of what licences mean together; `licences` draws the conclusion.
"""

from __future__ import annotations

import hashlib
import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdmerge_build.claims import Claimed, read_claims
from sdmerge_build.contribution import contributors
from sdmerge_build.errors import Issue, LicenceError, RecipeError
from sdmerge_build.facts import Facts, claims_in
from sdmerge_build.files import read_regular
from sdmerge_build.licences import (
    PERMISSIVE,
    Ancestor,
    Conclusion,
    Layer,
    Licence,
    PermissionsError,
    conclude,
    licence_for_base_model,
    licence_layer,
    licence_named,
    nearest_licences,
    permissions_layer,
    read_permissions,
    unknown_layer,
)
from sdmerge_build.plan import Plan, Step
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources import page_of
from sdmerge_build.sources.uri import CivitaiAddress, UriError, parse_uri

__all__ = ["ancestors_of", "ancestors_of_file", "concluded", "declared_license", "inherited", "licence_files", "refuse_release", "said_terms"]

MAX_TEXT = 4 << 20  # bytes of a licence's text
RECIPE, HUB, HEADER = "the recipe", "the hub", "its own header"
FLAGS = ("allowNoCredit", "allowCommercialUse", "allowDerivatives", "allowDifferentLicense")


def concluded(plan: Plan, step: Step, facts: Mapping[str, Facts]) -> Conclusion:
    """Conclude what the texts say of an artifact. Sources without `facts` are judged by what the recipe says of them."""
    release = plan.recipe.table.release
    return conclude(ancestors_of(plan, step, facts), declared=declared_license(plan, step) or None, policy=release.policy if release else "strict")


def declared_license(plan: Plan, step: Step) -> str:
    """Return the licence that the recipe declares for an artifact; nothing when it declares none."""
    release = plan.recipe.table.release
    return step.about.get("license") or (release.license if release and release.license else "")


def ancestors_of(plan: Plan, step: Step, facts: Mapping[str, Facts]) -> list[Ancestor]:
    """List the sources of an artifact and what their own headers name, in the order of the ancestry."""
    used = contributors(plan, step)
    ancestors: list[Ancestor] = []
    for name in plan.ancestors(step.name):
        if name in plan.sources:
            origin, known = plan.origins[name], facts.get(name)
            table = origin.recipe.table.source[origin.name]  # what was said of the source itself, also where a stand-in takes its place
            reader = _Reader(name, table, known.terms if known else {}, known.claims if known else {}, plan.architecture.name)
            notes = () if known else ("its file is not here, so what its header claims is not known",)
            ancestors += reader.ancestors(contributes=name in used, notes=notes)
    return ancestors


def ancestors_of_file(name: str, metadata: Mapping[str, str]) -> list[Ancestor]:
    """List a file of which nothing but its header is known, and what that names."""
    return list(_Reader(name, SourceTable(path=name), {}, claims_in(metadata), "").ancestors(contributes=True))


def said_terms(table: SourceTable, facts: Facts | None) -> dict[str, Any]:
    """Gather what is said of a source's terms by its recipe, or else by the hub, for whoever inherits them."""
    hub = dict(facts.terms) if facts else {}
    said: dict[str, Any] = {"license": table.license or _hub_license(hub)}
    said["permissions"] = table.permissions or {key: hub[key] for key in FLAGS if key in hub}
    said["evidence"] = {"url": table.evidence.url, "date": table.evidence.date.isoformat()} if table.evidence else {}
    said["credit"] = table.credit or _credit(hub)
    said["homepage"] = table.homepage
    return {key: value for key, value in said.items() if value}


class _Reader:
    """One source, and who says what of its terms."""

    def __init__(self, name: str, table: SourceTable, hub: Mapping[str, Any], claims: Mapping[str, str], family: str) -> None:
        self._name, self._table, self._hub, self._family = name, table, hub, family
        self._claims = read_claims(claims)
        self._notes: list[str] = list(self._claims.notes)
        self._is_ours = any(claimed.said_in == "sdbuild.lineage" for claimed in self._claims.ancestors)

    def ancestors(self, *, contributes: bool, notes: tuple[str, ...] = ()) -> Iterator[Ancestor]:
        """Yield the source, then those that its header names; what a source says of itself counts for all that is in it."""
        layers = (*self._licences(), *self._permissions())
        table = self._table
        credit, homepage = table.credit or _credit(self._hub) or self._claims.author, self._page
        yield self._ancestor(self._name, layers, contributes=contributes, credit=credit, homepage=homepage, notes=(*self._notes, *notes))
        for claimed in self._claims.ancestors:
            name = f"{self._name}: {claimed.name}"
            own, doubts = _claimed_layers(claimed)
            told = {"credit": claimed.credit, "homepage": claimed.homepage, "claimed_by": self._name}
            yield self._ancestor(name, own, contributes=contributes, notes=doubts, **told)

    @property
    def _page(self) -> str:
        """Name the page that shows the source and its terms: as the recipe says it, or behind its address."""
        if self._table.homepage:
            return self._table.homepage
        try:
            return page_of(self._table.uri) if self._table.uri else ""
        except UriError:
            return ""

    def _ancestor(self, name: str, layers: tuple[Layer, ...], **said: Any) -> Ancestor:
        return Ancestor(name=name, layers=layers, family=self._family, **said)

    def _licences(self) -> Iterator[Layer]:
        """Yield the licence of the file, or each that somebody names, where they do not agree."""
        said = list(self._said_licences())
        named = {by: licence for text, by in said if (licence := licence_named(text))}
        for text, by in said:
            if by not in named and not (by == HEADER and len(_joined_licences(text)) > 1):
                advice = nearest_licences(text)
                self._notes.append(f"`{text[:100]}`, as {by} says, is not a licence that is known" + (f"; {advice}" if advice else ""))
        ours = named.get(RECIPE)
        witnesses = {by: licence for by, licence in named.items() if by != RECIPE}
        hint = licence_for_base_model(_text(self._hub.get("baseModel")))
        if ours:
            yield self._of_recipe(ours, witnesses, hint)
            for by, licence in witnesses.items():
                if licence.id != ours.id:
                    self._notes.append(f"{by} says {licence.title}, the recipe says {ours.title}: both count")
                    yield licence_layer(licence, source=by, status="disputed")
        elif self._table.license:
            yield unknown_layer(self._table.license, source=RECIPE)
        elif witnesses:
            is_disputed = len({licence.id for licence in witnesses.values()}) > 1
            for by, licence in witnesses.items():
                yield licence_layer(licence, source=by, status="disputed" if is_disputed else "known" if by == HUB else "claimed")
        elif hint:
            yield licence_layer(hint, source="Civitai's table of base models", status="claimed")
        elif not self._is_ours and len(joined := _joined_licences(self._claims.license)) > 1:
            yield from (licence_layer(licence, source=HEADER, status="claimed") for licence in joined)
        elif self._is_ours:
            yield Layer(title="the terms of its own parents", terms=replace(PERMISSIVE, status="claimed"), source=HEADER)
        else:
            yield unknown_layer(said[0][0] if said else "no licence is said", source=said[0][1] if said else "nobody")

    def _said_licences(self) -> Iterator[tuple[str, str]]:
        """Yield who names which licence; what our own headers conclude is left to the ancestors that they name."""
        of_header = "" if self._is_ours and not licence_named(self._claims.license) else self._claims.license
        for text, by in ((self._table.license, RECIPE), (_hub_license(self._hub), HUB), (of_header, HEADER)):
            if text:
                yield text, by

    def _of_recipe(self, ours: Licence, witnesses: Mapping[str, Licence], hint: Licence | None) -> Layer:
        """Judge what the recipe says: by its evidence, or by who else says so."""
        if self._table.evidence:
            shown = f"{RECIPE}, with evidence: {self._table.evidence.url} on {self._table.evidence.date}"
            return licence_layer(ours, source=shown)
        if any(by == HUB and licence.id == ours.id for by, licence in witnesses.items()):
            return licence_layer(ours, source=HUB, status="known")
        if any(licence.id == ours.id for licence in witnesses.values()) or (hint and hint.id == ours.id):
            return licence_layer(ours, source=HEADER if witnesses else "Civitai's table of base models", status="claimed")
        self._notes.append("the recipe says its licence without evidence")
        return licence_layer(ours, source=f"{RECIPE}, without evidence", status="unknown")

    def _permissions(self) -> Iterator[Layer]:
        """Yield what its author permits beside the licence, as hub and recipe say it."""
        hub = {key: self._hub[key] for key in FLAGS if key in self._hub}
        ours = self._table.permissions
        if not hub and not ours:
            if _is_on_civitai(self._table.uri):
                self._notes.append("what its author permits on Civitai is not known")
                yield unknown_layer("permissions on Civitai", source="nobody")
            return
        differs = bool(hub and ours) and _parsed(hub) != _parsed(ours)
        if differs:
            self._notes.append("the hub's permissions are no longer those that the recipe says: both count")
        if hub:
            yield self._flags(hub, HUB, "disputed" if differs else "known")
        if ours and (differs or not hub):
            is_shown = self._table.evidence is not None
            by = f"{RECIPE}, with evidence" if is_shown else f"{RECIPE}, without evidence"
            yield self._flags(ours, by, "disputed" if differs else "known" if is_shown else "unknown")

    def _flags(self, raw: Mapping[str, Any], by: str, status: str) -> Layer:
        try:
            permissions = read_permissions(raw)
        except PermissionsError as error:
            self._notes.append(f"its permissions ({by}): {error}" + (f"; {error.hint}" if error.hint else ""))
            return unknown_layer("permissions on Civitai", source=by)
        self._notes += permissions.notes
        credit = self._table.credit or _credit(self._hub) or self._name
        return permissions_layer(permissions, source=by, status=status, credit=", ".join(filter(None, (credit, self._page))), url=self._page)


def _joined_licences(text: str) -> list[Licence]:
    """Read licences joined by AND, as our own headers conclude them; none, unless all of them are known."""
    found = [licence_named(part) for part in text.split(" AND ")]
    return [licence for licence in found if licence] if all(found) else []


def _claimed_layers(claimed: Claimed) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Return the terms that somebody's header gives for a parent; without any, whoever wrote the header answers for it.

    What was unknown or disputed when our own lineages were written stays so: nothing becomes better known by being merged.
    """
    layers, notes = [], []
    status = claimed.status if claimed.status in {"disputed", "unknown"} else "claimed"
    licence = licence_named(claimed.license)
    if licence:
        layers.append(licence_layer(licence, source=HEADER, status=status))
    elif claimed.license:
        notes.append(f"`{claimed.license[:100]}` is not a licence that is known")
        layers.append(unknown_layer(claimed.license, source=HEADER))
    if claimed.permissions:
        try:
            permissions = read_permissions(claimed.permissions)
        except PermissionsError as error:
            notes.append(f"its permissions {error}")
            layers.append(unknown_layer("permissions on Civitai", source=HEADER))
        else:
            layers.append(permissions_layer(permissions, source=HEADER, status=status, credit=claimed.credit or claimed.name, url=claimed.homepage))
    if not layers and status == "unknown":
        layers.append(unknown_layer("no licence is said", source=HEADER))
    elif not layers and claimed.status:
        layers.append(Layer(title="the terms of its own parents", terms=replace(PERMISSIVE, status=status), source=HEADER))
    elif not layers:
        notes.append("its terms are not known; whoever made the file answers for them")
        layers.append(Layer(title="no terms are said", terms=replace(PERMISSIVE, status="claimed"), source=HEADER))
    return tuple(layers), tuple(notes)


def _parsed(raw: Mapping[str, Any] | None) -> Any:
    try:
        return read_permissions(raw or {})
    except PermissionsError:
        return raw


def _is_on_civitai(uri: str | None) -> bool:
    try:
        return isinstance(parse_uri(uri or ""), CivitaiAddress)
    except UriError:
        return False


def _text(value: Any) -> str:
    """Take a text, or the first of a list of them, as cards on Hugging Face write licences."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else ""


def _hub_license(hub: Mapping[str, Any]) -> str:
    """Name the licence that a card on Hugging Face states; where its id is `other`, its name says more."""
    said = _text(hub.get("license"))
    return _text(hub.get("license_name")) or said if said == "other" else said


def _credit(hub: Mapping[str, Any]) -> str:
    """Name whom a hub names as the author."""
    model, creator = _text(hub.get("model")), _text(hub.get("creator")) or _text(hub.get("author"))
    return f"{model} by {creator}" if model and creator else model or creator


def refuse_release(plan: Plan, facts: Mapping[str, Facts], *, is_final: bool) -> None:
    """Raise `LicenceError` with every conflict that forbids to release what a plan asks for.

    Until it is final, what is only not known yet of a source without facts is passed over.
    """
    issues: dict[Issue, None] = {}
    for name in plan.wanted:
        step = plan.steps[name]
        conclusion = concluded(plan, step, facts)
        for conflict in conclusion.conflicts:
            is_open = conflict.id == "C8" and not is_final and any(a.partition(": ")[0] not in facts for a in conflict.ancestors)
            if conflict.level == "conflict" and not is_open:
                what = f"artifact `{name}` cannot be released ({conflict.id}): {conflict.what}"
                issues[Issue(where=plan.where("step", name), what=what, hint=conflict.hint)] = None
    if issues:
        raise LicenceError(*issues)


@dataclass(frozen=True, slots=True)
class LicenceFile:
    """The text of a licence that a recipe holds: its place, seen from the root recipe's folder, and its sha256."""

    place: str
    sha256: str


def inherited(name: str, facts: Facts) -> Iterator[dict[str, Any]]:
    """Yield what a source's own header says of its parents' terms, to be handed on: whoever uses the result comes under them too."""
    for claimed in read_claims(facts.claims).ancestors:
        if claimed.said_in == "sdbuild.lineage" or claimed.license or claimed.permissions:
            said = {key: getattr(claimed, key) for key in ("sha256", "uri", "license", "permissions", "evidence", "credit", "homepage")}
            status = claimed.status if claimed.status in {"disputed", "unknown"} else "claimed"
            yield {"name": f"{name}: {claimed.name}", "status": status} | {key: value for key, value in said.items() if value}


def licence_files(plan: Plan) -> dict[str, LicenceFile]:
    """Read the licence texts that sources name. Raises `RecipeError` when one cannot be read."""
    files, issues = {}, []
    home = plan.recipe.path.parent.resolve()
    for name, origin in plan.origins.items():
        said = origin.recipe.table.source[origin.name].license_file if name in plan.sources else None
        if not said:
            continue
        path = origin.recipe.path.parent.resolve() / said
        try:
            content = read_regular(path, MAX_TEXT)
        except (OSError, ValueError) as error:
            what = f"the licence file `{said}` of source `{name}` cannot be read: {getattr(error, 'strerror', None) or error}"
            issues.append(Issue(where=plan.where("source", name, "license_file"), what=what))
            continue
        files[name] = LicenceFile(Path(os.path.relpath(path, home)).as_posix(), hashlib.sha256(content).hexdigest())
    if issues:
        raise RecipeError(*issues)
    return files
