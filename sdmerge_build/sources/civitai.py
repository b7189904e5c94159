"""Owns what Civitai says: versions, their files and hashes, the terms on the model's page, and whose a file is.

Has never heard of downloads. API: https://developer.civitai.com/docs/api; licence fields are on the model, not on the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources.offers import Offer, expect, hex_or_none, is_plain, tables, text_of
from sdmerge_build.sources.trust import GoneError, WebError
from sdmerge_build.sources.uri import CivitaiAddress
from sdmerge_build.sources.web import Web

__all__ = ["Civitai", "known_as"]

NAME = "Civitai"
TERMS = ("allowNoCredit", "allowCommercialUse", "allowDerivatives", "allowDifferentLicense")
_WEIGHTS = {"Model", "Pruned Model"}


class Civitai:
    """Models on civitai.com, or on a mirror that answers like it."""

    home = "https://civitai.com"

    def offer(self, web: Web, base: str, address: CivitaiAddress, source: SourceTable, *, with_terms: bool) -> Offer:
        """Find the file of a version: the one that is said, or that has the digest the recipe pins, or the only one there is."""
        version = web.json(f"{base}/api/v1/model-versions/{address.version}")
        model = expect(version, "modelId", int, NAME)
        if model != address.model:
            raise WebError(f"{NAME} says that version {address.version} belongs to model {model}, not {address.model}")
        files = [file for file in tables(version.get("files")) if text_of(file.get("type")) in _WEIGHTS]
        file = _choose(files, address, source)
        hashes = _hashes(file)
        size = file.get("sizeKB")
        return Offer(
            address=self.home + _download_path(address, file),
            filename=text_of(file.get("name")),
            size=round(size * 1024) if isinstance(size, int | float) and 0 < size < 2**40 else None,
            sha256=hex_or_none(hashes.get("SHA256")),
            blake3=hex_or_none(hashes.get("BLAKE3")),
            page=f"{self.home}/models/{model}?modelVersionId={address.version}",
            terms=_terms(web.json(f"{base}/api/v1/models/{model}"), text_of(version.get("baseModel"))) if with_terms else {},
        )


def known_as(web: Web, base: str, sha256: str) -> str:
    """Say whose file this is, where Civitai knows it; otherwise nothing. Raises nothing: it is a courtesy."""
    try:
        version = web.json(f"{base}/api/v1/model-versions/by-hash/{sha256}")
        model, number = expect(version, "modelId", int, NAME), expect(version, "id", int, NAME)
    except WebError:
        return ""
    named = version.get("model")
    title = " ".join(filter(None, (text_of(table.get("name")) for table in (named, version) if isinstance(table, dict))))
    return f"{NAME} knows it as {title[:200]} (civitai:{model}@{number})"


def _choose(files: list[dict[str, Any]], address: CivitaiAddress, source: SourceTable) -> dict[str, Any]:
    """Choose one file of a version. Raises `WebError` when that would be a guess."""
    if not files:
        raise GoneError(
            f"{NAME} offers no file for version {address.version}",
            "it may have been archived or taken down; a file you have can be found by its sha256",
        )
    if address.file is not None:
        files = [file for file in files if file.get("id") == address.file]
        if not files:
            raise WebError(f"{NAME} knows no file {address.file} of version {address.version}")
    pins = {"SHA256": source.sha256, "BLAKE3": source.blake3}
    for name, pin in pins.items():
        matching = [file for file in files if pin and hex_or_none(_hashes(file).get(name)) == pin.lower()]
        if matching:
            return matching[0]
    if source.filename and len(files) > 1:
        files = [file for file in files if text_of(file.get("name")).casefold() == source.filename.casefold()] or files
    if len(files) > 1 and not any(pins.values()):
        listed = ", ".join(
            f"`civitai:{address.model}@{address.version}#{str(file.get('id'))[:20]}` ({text_of(file.get('name'))[:80]})" for file in files[:8]
        )
        raise WebError(f"version {address.version} has {len(files)} files on {NAME}", f"say which: {listed}")
    return next((file for file in files if file.get("primary")), files[0])


def _hashes(file: Mapping[str, Any]) -> dict[str, Any]:
    hashes = file.get("hashes")
    return hashes if isinstance(hashes, dict) else {}


def _download_path(address: CivitaiAddress, file: Mapping[str, Any]) -> str:
    """Write the download address as the API gives it, which redirects to the file's bytes anew each time; the host is the hub's own."""
    query = text_of(file.get("downloadUrl")).partition("#")[0].partition("?")[2]
    chosen = [(name, value) for name, value in parse_qsl(query) if name in {"type", "format", "size", "fp", "fileId"}]
    return f"/api/download/models/{address.version}" + (f"?{urlencode(chosen)}" if chosen else "")


def _terms(model: Any, family: str) -> dict[str, Any]:
    """Take the licence fields as they are sent, in whatever shape: what they mean is not for this module to say."""
    if not isinstance(model, dict):
        raise WebError(f"{NAME} answers in a form that is not known", "is there a newer sdbuild?")
    creator = model.get("creator")
    terms = {name: model[name] for name in TERMS if is_plain(model.get(name))}
    names = {
        "baseModel": family,
        "model": text_of(model.get("name")),
        "creator": text_of(creator.get("username")) if isinstance(creator, dict) else "",
    }
    return terms | {name: value for name, value in names.items() if value}
