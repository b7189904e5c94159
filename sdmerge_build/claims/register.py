"""Owns one ancestor that a header names, and the register of them in which each stands once, however often and by whatever it is named.

Has never heard of the dialects of headers.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdmerge_build.claims.text import line
from sdmerge_build.digest import is_hex

__all__ = ["MAX_CLAIMS", "WEIGHTS", "Claimed", "Register", "hashes_of", "mentioned", "title_of"]

MAX_CLAIMS = 1000  # ancestors of one file
_TITLE = re.compile(r"(.*\S)\s*\[([0-9a-f]{8,12})\]")  # as AUTOMATIC1111 shows a file: name and short hash
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:)?[\\/]|~[\\/]")
WEIGHTS = re.compile(r"\.(?:safetensors|sft|ckpt|pt|pth|bin|gguf)\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """One ancestor that somebody's header names; every text is printable and one line."""

    name: str  # never empty: what is only known by a hash is called by its first ten digits
    said_in: str
    sha256: str = ""
    short_hash: str = ""  # eight to twelve digits, of whatever kind
    license: str = ""
    credit: str = ""
    homepage: str = ""
    uri: str = ""
    recipe: str = ""  # how it was made itself
    permissions: Mapping[str, Any] = field(default_factory=dict)  # what could not be kept as it was is `…`, which is no permission
    evidence: Mapping[str, Any] = field(default_factory=dict)
    status: str = ""  # how far its terms were known to whoever wrote the header


def mentioned(title: Any, said_in: str, hashes: tuple[str, str] = ("", "")) -> Iterator[Claimed]:
    """Yield an ancestor, if it has a name, or a hash: sha256 and short."""
    (name, shown), (sha256, short) = title_of(title), hashes
    name = "" if name.casefold() == "none" else name
    if name or any(hashes):
        yield Claimed(name=name or sha256[:10] or short, sha256=sha256, short_hash=short or shown, said_in=said_in)


def hashes_of(value: Any) -> tuple[str, str]:
    """Read a hash: a sha256, or else a short one; neither where there is none."""
    digits = value[:80].strip().lower().removeprefix("0x") if isinstance(value, str) else ""
    return (digits, "") if is_hex(digits) else ("", digits if re.fullmatch("[0-9a-f]{8,12}", digits) else "")


def title_of(value: Any) -> tuple[str, str]:
    """Read a name, and the short hash behind it; of an absolute path, which is about its author's machine, the last part."""
    if isinstance(value, str) and _ABSOLUTE.match(value.lstrip()):
        value = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    name = line(value)
    shown = _TITLE.fullmatch(name)
    return (shown[1], shown[2]) if shown else (name, "")


class Register:
    """The ancestors so far, each once: by sha256, else by short hash or name; one that is said to have other terms counts again."""

    def __init__(self) -> None:
        self.ancestors: list[Claimed] = []
        self.is_full = False
        self._known: dict[tuple[str, str | None], int] = {}

    def add(self, claimed: Claimed) -> None:
        """Take a mention: of somebody new, or of somebody known, of whom it may say more."""
        terms = _terms(claimed)
        for sign in itertools.product(_signs_of(claimed), (terms, "") if terms else (None,)):
            at = self._known.get(sign)
            if at is not None and _may_be_same(self.ancestors[at], claimed):
                self._keep(at, _together(self.ancestors[at], claimed))
                return
        self.is_full = len(self.ancestors) == MAX_CLAIMS
        if not self.is_full:
            self._keep(len(self.ancestors), claimed)

    def _keep(self, at: int, claimed: Claimed) -> None:
        self.ancestors[at : at + 1] = [claimed]
        for sign in (*_signs_of(claimed), *_further_signs(claimed)):
            if self._known.get((sign, "")) == at:
                del self._known[sign, ""]
            for terms in (_terms(claimed), None):  # None: whatever its terms
                self._known.setdefault((sign, terms), at)


def _signs_of(claimed: Claimed) -> list[str]:
    """List by what an ancestor is known when it is named again: its sha256 alone, where that is said."""
    if claimed.sha256:
        return [claimed.sha256]
    short = [f"short {claimed.short_hash}"] if claimed.short_hash else []
    return [*short, f"name {claimed.name.casefold()}", *([] if re.search(r"[\\/]", claimed.name) else [f"stem {_stem(claimed.name)}"])]


def _further_signs(claimed: Claimed) -> list[str]:
    """List what whoever names it again, without its sha256, might say."""
    short = [f"short {digits}" for digits in (claimed.short_hash, claimed.sha256[:10]) if digits]
    return [*short, f"name {claimed.name.casefold()}", f"stem {_stem(claimed.name)}"]


def _stem(name: str) -> str:
    return WEIGHTS.sub("", re.split(r"[\\/]", name)[-1]).casefold()


def _terms(claimed: Claimed) -> str:
    said = [claimed.license, claimed.permissions, claimed.status, claimed.credit if claimed.license or claimed.permissions else ""]
    return json.dumps(said, sort_keys=True) if any(said) else ""


def _may_be_same(known: Claimed, named: Claimed) -> bool:
    """Tell whether no digest speaks against it."""
    if named.sha256:
        return named.sha256 == known.sha256
    if known.sha256 and len(named.short_hash) >= 10:  # eight digits are of another kind
        return known.sha256.startswith(named.short_hash)
    return known.short_hash in {"", named.short_hash} or not named.short_hash


def _together(known: Claimed, named: Claimed) -> Claimed:
    """Fill in what was not known of an ancestor."""
    blank = ("sha256", "short_hash", "license", "credit", "homepage", "uri", "recipe", "permissions", "evidence", "status")
    filled = {name: getattr(known, name) or getattr(named, name) for name in blank}
    return replace(known, name=known.name if known.name != known.sha256[:10] else named.name, **filled)
