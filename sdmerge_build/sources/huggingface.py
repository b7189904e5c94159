"""Owns what Hugging Face says: the commit behind a revision, a file's sha256 and size, and the licence on the model's card.

Has never heard of downloads, nor of the hub's own library. API: https://huggingface.co/docs/hub/api, and the headers of `/resolve/`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from sdmerge_build.errors import SdbuildError
from sdmerge_build.formats.folder import choose_parts, is_entry
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources.offers import Offer, expect, hex_or_none, is_plain, tables, text_of
from sdmerge_build.sources.trust import WebError
from sdmerge_build.sources.uri import HuggingFaceAddress
from sdmerge_build.sources.web import Web

__all__ = ["HuggingFace"]

NAME = "Hugging Face"
TERMS = ("license", "license_name", "license_link")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


class HuggingFace:
    """Files on huggingface.co, or on a mirror that answers like it."""

    home = "https://huggingface.co"

    def offer(self, web: Web, base: str, address: HuggingFaceAddress, source: SourceTable, *, with_terms: bool) -> Offer:  # noqa: ARG002
        """Find the file at a revision, and the commit that the revision means today."""
        commit, file, info = address.revision, address.file, {}
        is_index = is_entry(file.rpartition("/")[2])
        if with_terms or not file or is_index or not _is_commit(commit):
            info = web.json(f"{base}/api/models/{address.repo}/revision/{quote(address.revision, safe='')}")
            commit = expect(info, "sha", str, NAME)
            if not _is_commit(commit):
                raise WebError(f"{NAME} names no commit for `{address.revision}`")
        file = file or _only_checkpoint(address.repo, listing(info))
        offer = replace(self._file(web, base, address.repo, commit, file), terms=_terms(info) if with_terms else {})
        return replace(offer, parts=self._parts(web, base, address.repo, commit, file, listing(info))) if is_index else offer

    def _file(self, web: Web, base: str, repo: str, commit: str, file: str) -> Offer:
        path = f"/{repo}/resolve/{commit}/{quote(file)}"
        headers = web.head(base + path)
        size = headers.get("x-linked-size", "")
        return Offer(
            address=self.home + path,
            filename=file.rpartition("/")[2],
            size=int(size) if size.isdecimal() and len(size) < 19 else None,
            sha256=hex_or_none(headers.get("x-linked-etag")),
            revision=commit,
            page=f"{self.home}/{repo}/blob/{commit}/{file}",
        )

    def _parts(self, web: Web, base: str, repo: str, commit: str, index: str, files: list[str]) -> tuple[tuple[str, Offer], ...]:
        """Find the files of a checkpoint that lies in several: what its index names, and the indexes that had to be read to know."""
        folder, _, entry = index.rpartition("/")
        inside = f"{folder}/" if folder else ""
        names = {file.removeprefix(inside) for file in files if file.startswith(inside)}
        indexes: dict[str, None] = {}

        def read(name: str) -> bytes:
            indexes[name] = None
            return web.whole(f"{base}/{repo}/resolve/{commit}/{quote(inside + name)}")

        try:
            parts = choose_parts(entry, names, read)
        except SdbuildError as error:
            raise WebError("; ".join(f"{issue.where}: {issue.what}" for issue in error.issues)) from None
        chosen = dict.fromkeys((*indexes, *(part.path for part in parts)))
        return tuple((name, self._file(web, base, repo, commit, inside + name)) for name in chosen)


def listing(info: Any) -> list[str]:
    """List the files of a repository, as its API answer names them."""
    siblings = info.get("siblings") if isinstance(info, dict) else None
    return [name for item in tables(siblings) if (name := text_of(item.get("rfilename")))]


def _only_checkpoint(repo: str, files: list[str]) -> str:
    found = [file for file in files if file.endswith(_WEIGHTS) and "/" not in file]
    if len(found) != 1:
        shown = ", ".join(f"`{file}`" for file in found[:5])
        raise WebError(f"{repo} holds {len(found)} checkpoints", f"say which: hf:{repo}/FILE@REVISION; there are {shown}" if found else "")
    return found[0]


def _is_commit(revision: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def _terms(info: Any) -> dict[str, Any]:
    """Take the licence fields as they are sent: what they mean is not for this module to say."""
    card = info.get("cardData") if isinstance(info, dict) else None
    terms = {name: card[name] for name in TERMS if isinstance(card, dict) and is_plain(card.get(name))}
    author = text_of(info.get("author"))
    return terms | ({"author": author} if author else {})
