"""Owns whose terms an artifact comes under: from plan, lock and headers to ancestors, and to the conclusion that a release needs.

Has never heard of the store or of what licences mean together; `licences` draws the conclusion, `testimony` hears who says what.
"""

from __future__ import annotations

import functools
import hashlib
import os.path
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdmerge_build.contribution import contributors
from sdmerge_build.errors import Issue, LicenceError, RecipeError
from sdmerge_build.facts import Facts, claims_in
from sdmerge_build.files import read_regular
from sdmerge_build.licences import Ancestor, Conclusion, conclude
from sdmerge_build.plan import Plan, Step
from sdmerge_build.recipe import SourceTable
from sdmerge_build.testimony import OF_PARENTS, Testimony, claims_of, credit_of, licences_of, permissions_of

__all__ = [
    "ancestors_of",
    "ancestors_of_file",
    "concluded",
    "declared_license",
    "handed_on",
    "licence_files",
    "refusals",
    "refuse_release",
    "said_terms",
]

MAX_TEXT = 4 << 20  # bytes of a licence's text


def concluded(plan: Plan, step: Step, facts: Mapping[str, Facts]) -> Conclusion:
    """Conclude what the texts say of an artifact. Sources without `facts` are judged by what the recipe says of them."""
    release = plan.recipe.table.release
    return _concluded(tuple(ancestors_of(plan, step, facts)), declared_license(plan, step), release.policy if release else "strict")


@functools.lru_cache(maxsize=256)
def _concluded(ancestors: tuple[Ancestor, ...], declared: str, policy: str) -> Conclusion:
    """Draw a conclusion once for all artifacts of the same ancestors."""
    return conclude(ancestors, declared=declared or None, policy=policy)


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
            notes = () if name in facts else ("its file is not here, so what its header claims is not known",)
            ancestors += _ancestors(_testimony(plan, name, facts.get(name)), notes, contributes=name in used)
    return ancestors


def ancestors_of_file(name: str, metadata: Mapping[str, str]) -> list[Ancestor]:
    """List a file of which nothing but its header is known, and what that names."""
    testimony = Testimony(name, SourceTable(path=name), {}, claims_of(claims_in(metadata)))
    return list(_ancestors(testimony, (), contributes=True))


def handed_on(plan: Plan, name: str, facts: Facts) -> Iterator[dict[str, Any]]:
    """Yield the rows that hand on a source's terms, and those of whom its header names: whoever uses the result comes under them too."""
    testimony = _testimony(plan, name, facts)
    said = {key: value for key, value in said_terms(testimony.table, facts).items() if key in {"credit", "homepage", "evidence"}}
    said |= {"credit": testimony.credit} if testimony.credit else {}
    for row in _together(testimony.rows):
        yield {"name": name} | said | row
    for claimed in testimony.claims.ancestors:
        if claimed.said_in == "sdbuild.lineage" or claimed.license or claimed.permissions:
            told = {key: getattr(claimed, key) for key in ("sha256", "uri", "license", "permissions", "evidence", "credit", "homepage")}
            status = claimed.status if claimed.status in {"disputed", "unknown", OF_PARENTS} else "claimed"
            yield {"name": f"{name}: {claimed.name}", "status": status} | {key: value for key, value in told.items() if value}


def said_terms(table: SourceTable, facts: Facts) -> dict[str, Any]:
    """Gather what is said of a source's terms by its recipe, or else by the hub, in the recipe's words."""
    said: dict[str, Any] = {"license": table.license or " AND ".join(licences_of(facts.terms))}
    said["permissions"] = table.permissions or permissions_of(facts.terms)
    said["evidence"] = {"url": table.evidence.url, "date": table.evidence.date.isoformat()} if table.evidence else {}
    said["credit"] = table.credit or credit_of(facts.terms)
    said["homepage"] = table.homepage
    return {key: value for key, value in said.items() if value}


def _together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write a licence and the permissions beside it as one row, where both are known equally well."""
    if len(rows) == 2 and rows[0]["status"] == rows[1]["status"] and {*rows[0], *rows[1]} == {"license", "permissions", "status"}:
        return [rows[0] | rows[1]]
    return rows


class _Same:
    """Stands for an object, and is equal to what stands for the same one."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __hash__(self) -> int:
        return id(self.of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of


def _testimony(plan: Plan, name: str, facts: Facts | None) -> Testimony:
    origin = plan.origins[name]
    table = origin.recipe.table.source[origin.name]  # what was said of the source itself, also where a stand-in takes its place
    return _heard(name, _Same(table), _Same(facts))


@functools.lru_cache(maxsize=1024)
def _heard(name: str, table: _Same, facts: _Same) -> Testimony:
    """Hear a source once, for however many artifacts."""
    return Testimony(name, table.of, facts.of.terms if facts.of else {}, claims_of(facts.of.claims if facts.of else {}))


def _ancestors(testimony: Testimony, notes: tuple[str, ...], *, contributes: bool) -> Iterator[Ancestor]:
    """Yield a source, then whom its header names."""
    yield Ancestor(
        name=testimony.name,
        layers=tuple(testimony.layers),
        contributes=contributes,
        credit=testimony.credit,
        homepage=testimony.page,
        family=testimony.family,
        notes=(*testimony.notes, *notes),
    )
    for parent in testimony.parents:
        yield Ancestor(
            name=f"{testimony.name}: {parent.claimed.name}",
            layers=parent.layers,
            contributes=contributes,
            credit=parent.claimed.credit,
            homepage=parent.claimed.homepage,
            family=testimony.family,
            claimed_by=testimony.name,
            notes=parent.notes,
        )


def refuse_release(plan: Plan, facts: Mapping[str, Facts], *, is_final: bool) -> None:
    """Raise `LicenceError` with every conflict that forbids to release what a plan asks for."""
    refused = refusals(plan, facts, is_final=is_final).values()
    if refused:
        raise LicenceError(*dict.fromkeys(issue for error in refused for issue in error.issues))


def refusals(plan: Plan, facts: Mapping[str, Facts], *, is_final: bool) -> dict[str, LicenceError]:
    """Find the conflicts that forbid to release what a plan asks for, by artifact.

    Until it is final, what is only not known yet of a source without facts is passed over.
    """
    refused = {}
    for name in plan.wanted:
        issues = []
        for conflict in concluded(plan, plan.steps[name], facts).conflicts:
            is_open = conflict.id == "C8" and not is_final and any(a.partition(": ")[0] not in facts for a in conflict.ancestors)
            if conflict.level == "conflict" and not is_open:
                what = f"artifact `{name}` cannot be released ({conflict.id}): {conflict.what}"
                issues.append(Issue(where=plan.where("step", name), what=what, hint=conflict.hint))
        if issues:
            refused[name] = LicenceError(*issues)
    return refused


@dataclass(frozen=True, slots=True)
class LicenceFile:
    """The text of a licence that a recipe holds: its place, seen from the root recipe's folder, and its sha256."""

    place: str
    sha256: str


def licence_files(plan: Plan) -> dict[str, LicenceFile]:
    """Read the licence texts that sources name. Raises `RecipeError` when one cannot be read.

    A text lies in the folder of the recipe that names it, or below: a stranger's recipe must not put other files into a release.
    """
    files, issues = {}, []
    home = plan.recipe.path.parent.resolve()
    for name, origin in plan.origins.items():
        said = origin.recipe.table.source[origin.name].license_file if name in plan.sources else None
        if not said:
            continue
        try:
            folder = origin.recipe.path.parent.resolve()
            path = (folder / said).resolve()
            if Path(said).is_absolute() or not path.is_relative_to(folder):
                raise ValueError("it must lie in the recipe's folder, or below")
            digest = hashlib.sha256(read_regular(path, MAX_TEXT)).hexdigest()
            files[name] = LicenceFile(Path(os.path.relpath(folder / said, home)).as_posix(), digest)
        except (OSError, ValueError, RuntimeError) as error:
            what = f"the licence file `{said}` of source `{name}` cannot be read: {getattr(error, 'strerror', None) or error}"
            issues.append(Issue(where=plan.where("source", name, "license_file"), what=what))
    if issues:
        raise RecipeError(*issues)
    return files
