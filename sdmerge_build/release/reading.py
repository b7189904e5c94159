"""Owns how a release reads a manifest: its terms, its licences, its parents and where they come from.

Has never heard of files, or of what the documents look like. A manifest without terms is read as one of which nothing is known.
Ids of Hugging Face: hub-docs `repositories-licenses.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sdmerge_build.licences import ATTACHMENT_B
from sdmerge_build.release.writing import address, file_name, one_line
from sdmerge_build.sources.uri import HuggingFaceAddress, UriError, page_of, parse_uri

__all__ = [
    "PROJECT", "SPDX_IDS", "Manifest", "ancestor_of", "author_of", "binding_layers", "hub_license", "license_ids", "license_of", "page",
    "release_of", "repository", "rests_on", "stem_of", "terms_of", "title_of",
]  # fmt: skip

PROJECT = "https://github.com/sdbuild/sdbuild"
"""Where sdbuild itself is found; identifiers of formats we define begin with it."""

Manifest = Mapping[str, Any]

SPDX_IDS = frozenset({
    "Apache-2.0", "MIT", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0",
    "AGPL-3.0-only", "AGPL-3.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later", "OpenMDW-1.0",
})  # fmt: skip
"""Ids of the SPDX list that models come under; what is not here is written as a name, which is always valid."""

_HUB_IDS = {
    "LicenseRef-CreativeML-OpenRAIL-M": "creativeml-openrail-m",
    "LicenseRef-CreativeML-OpenRAIL-PP-M": "openrail++",
    "LicenseRef-scancode-bigscience-open-rail-m": "bigscience-openrail-m",
} | {id_: re.sub(r"-(?:only|or-later)$", "", id_.lower()) for id_ in SPDX_IDS if not id_.startswith("OpenMDW")}

_HUB_NAMES = {
    "LicenseRef-scancode-fair-ai-public-1.0-sd": "faipl-1.0-sd",
    "LicenseRef-scancode-flux-1-nc": "flux-1-dev-non-commercial-license",
    "LicenseRef-scancode-stability-ai-community-2024": "stabilityai-ai-community",
}


def terms_of(manifest: Manifest) -> Manifest:
    """Return what was concluded; of a manifest without terms, that nothing is known."""
    terms = manifest.get("terms")
    return terms if isinstance(terms, Mapping) else {"share": "no", "status": "unknown", "summary": "the manifest says nothing of terms"}


def release_of(manifest: Manifest) -> Manifest:
    """Return what the recipe says of the release; empty where it says nothing."""
    release = manifest.get("release")
    return release if isinstance(release, Mapping) else {}


def title_of(manifest: Manifest) -> str:
    """Return the title that people read."""
    return one_line(release_of(manifest).get("title") or manifest["artifact"].get("title") or manifest["artifact"]["name"])


def author_of(manifest: Manifest) -> str:
    """Name who made the merge; empty where nobody says."""
    return one_line(release_of(manifest).get("author") or manifest["artifact"].get("author") or "")


def stem_of(manifest: Manifest) -> str:
    """Name the release's files, without their endings."""
    return file_name(manifest["artifact"]["name"])


def license_of(manifest: Manifest) -> str:
    """Return the id or expression the release comes under: as its author declares it, else as it was concluded; empty when neither."""
    declared, terms = str(release_of(manifest).get("license") or ""), terms_of(manifest)
    known = {str(layer.get(key)).casefold(): str(layer["id"]) for _, layer in binding_layers(manifest) for key in ("title", "id") if layer.get("id")}
    if terms.get("license"):
        known[str(terms.get("license_title") or terms["license"]).casefold()] = str(terms["license"])
    return known.get(declared.casefold(), declared) or str(terms.get("license") or "")


def license_ids(expression: str) -> list[str]:
    """List the ids of an expression, in its order; a text that is none is its own id."""
    ids = re.split(r"\s+(?:AND|OR|WITH)\s+", expression.strip())
    plain = [part.strip("() ") for part in ids]
    return list(dict.fromkeys(plain)) if all(re.fullmatch(r"[A-Za-z0-9.+-]+", part) for part in plain) else [expression] if expression else []


def hub_license(license_id: str) -> tuple[str, str]:
    """Return the id Hugging Face has for a licence, and the name to give where that id is only `other`."""
    if license_id in _HUB_IDS or license_id.lower() in _HUB_IDS.values():
        return _HUB_IDS.get(license_id, license_id.lower()), ""
    if not license_id:
        return "unknown", ""
    parts = [part for part in license_id.split(" AND ") if not part.startswith(ATTACHMENT_B)]
    if parts and len(parts) < len(license_id.split(" AND ")):  # authors' flags, each with an id of its own that says nothing to a reader
        hub_id, name = hub_license(" AND ".join(parts))
        return "other", f"{name or hub_id}-with-civitai-permissions"
    return "other", _HUB_NAMES.get(license_id) or re.sub(r"[^a-z0-9.+]+", "-", license_id.removeprefix("LicenseRef-").lower()).strip("-") or "other"


def binding_layers(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield every text that binds the result, with the ancestor it binds through; what contributes nothing binds nothing."""
    for ancestor in terms_of(manifest).get("ancestor", []):
        if ancestor.get("contributes", True):
            for layer in ancestor.get("layer", []):
                yield str(ancestor["name"]), layer


def ancestor_of(manifest: Manifest, name: str, claimed_by: str = "") -> Manifest:
    """Return what the terms say of an ancestor; empty where they say nothing. Claimed ones are named after who names them as well."""
    ancestors, names = terms_of(manifest).get("ancestor", []), {name, f"{claimed_by}: {name}"}
    return next((a for a in ancestors if a.get("name") in names and a.get("claimed_by", "") == claimed_by), {})


def rests_on(manifest: Manifest, component: str) -> list[Manifest]:
    """List the reasons for a component of the concluded terms."""
    return [reason for reason in terms_of(manifest).get("reason", []) if reason.get("component") == component]


def page(source: Manifest) -> str:
    """Name the web page of a source: the one its recipe names, else that of its address; empty where there is none."""
    if homepage := address(source.get("homepage", "")):
        return homepage
    try:
        return address(page_of(str(source.get("uri", ""))))
    except UriError:
        return ""


def repository(source: Manifest) -> str:
    """Name the repository on Hugging Face that a source comes from, as OWNER/REPO; empty for sources from elsewhere."""
    try:
        place = parse_uri(str(source.get("uri", "")))
    except UriError:
        return ""
    return place.repo if isinstance(place, HuggingFaceAddress) and re.fullmatch(r"[\w][\w.-]{0,95}/[\w.-]{1,96}", place.repo, re.ASCII) else ""
