"""Owns what the schemes have in common: an offer, the Protocol of who makes one, and careful reading of what hubs answer.

Has never heard of any hub in particular.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sdmerge_build.digest import is_hex
from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources.trust import WebError
from sdmerge_build.sources.web import Web

__all__ = ["Offer", "Scheme", "expect", "hex_or_none", "is_plain", "tables", "text_of"]

MOST_TEXT = 1000  # characters that are believed of a name

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a host says of a file: where it lies for good, and what it is. Believed only once the bytes are here."""

    address: str  # without secrets, and good for longer than a day
    filename: str
    size: int | None = None  # bytes
    sha256: str | None = None
    blake3: str | None = None
    revision: str = ""  # the commit, where there is one
    page: str = ""
    terms: Mapping[str, Any] = field(default_factory=dict)  # the hub's licence fields, as it gives them
    parts: tuple[tuple[str, Offer], ...] = ()  # the files, by path, of a checkpoint of which this is the index; itself among them


class Scheme(Protocol):
    """A kind of address that files can be had from."""

    home: str
    """The hub's base address; empty where every address has its own host."""

    def offer(self, web: Web, base: str, address: Any, source: SourceTable, *, with_terms: bool) -> Offer:
        """Find the file that an address means. `base` is where the hub is asked; raises `WebError`."""


def expect(table: Any, name: str, kind: type[Kind], where: str) -> Kind:
    """Take a field out of what a hub answered. Raises `WebError` when it is not what hubs answer."""
    value = table.get(name) if isinstance(table, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise WebError(f"{where} answers in a form that is not known (`{name}`)", "is there a newer sdbuild?")
    return value


def hex_or_none(value: object) -> str | None:
    """Read a digest of 64 hex digits, as hubs write them, in either case; anything else is none."""
    text = value.strip('" ').lower() if isinstance(value, str) else ""
    return text if is_hex(text) else None


def tables(value: Any) -> list[dict[str, Any]]:
    """Take the tables of a list; whatever else is there is left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_of(value: Any) -> str:
    """Take a text, as far as it can be written down: JSON can hold halves of characters. Anything else is no text."""
    return value[:MOST_TEXT].encode(errors="replace").decode() if isinstance(value, str) else ""


def is_plain(value: Any) -> bool:
    """Tell whether a licence field is of a kind that can be written down as it is: a truth, a text, or a list of texts."""
    texts = value if isinstance(value, list) and len(value) < 100 else [value]
    return isinstance(value, bool) or all(isinstance(item, str) and item == text_of(item) for item in texts)
