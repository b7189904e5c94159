"""Owns the licences that are known: their names as people write them, their terms, and the addresses of their texts.

Has never heard of models, recipes or hubs; what it knows is in `licences.toml`, beside it, and no text of a licence is bundled.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdmerge_build.errors import nearest
from sdmerge_build.licences.terms import Cap, Terms

__all__ = ["Licence", "licence_for_base_model", "licence_named", "licences", "nearest_licences"]

MAX_NAME = 200  # longer than any name of a licence; strangers write what they like


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """A text that is known; `clauses` quotes what each component of `terms` rests on, and `note` says what is disputed about it."""

    id: str
    title: str
    url: str
    huggingface: str  # the hub's id; "other" where it has none
    license_name: str  # what the hub's `license_name` says where the id is "other"
    aliases: tuple[str, ...]
    terms: Terms
    clauses: Mapping[str, str]
    note: str

    def names(self) -> tuple[str, ...]:
        """List everything this licence is called; "other" is no name."""
        hub = self.license_name or self.huggingface
        return tuple(dict.fromkeys((self.id, self.title, self.url, hub, *self.aliases)))


@functools.cache
def licences() -> tuple[Licence, ...]:
    """Read every licence that is known, in the order of the file."""
    return tuple(_licence(row) for row in _file()["license"])


def licence_named(text: str) -> Licence | None:
    """Find a licence by its id, title, address, or what people call it; capitals, spaces and punctuation do not count, but `+` does.

    "unknown", "other", the empty text and whatever is not in the catalogue are no licence.
    """
    return _index().get(_folded(text)) if len(text) <= MAX_NAME else None


def nearest_licences(text: str) -> str:
    """Say which licence was probably meant, as a hint; empty when none is near."""
    return nearest(text[:MAX_NAME], (name for licence in licences() for name in licence.names() if not name.startswith("https:")))


def licence_for_base_model(text: str) -> Licence | None:
    """Look up Civitai's table of base models: a hint, for it is known to be wrong about some authors' texts; `None` where it names no known text."""
    return _base_models().get(_folded(text)) if len(text) <= MAX_NAME else None


@functools.cache
def _file() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "licences.toml").read_text(encoding="utf-8"))


@functools.cache
def _index() -> dict[str, Licence]:
    return {_folded(name): licence for licence in licences() for name in licence.names()}


@functools.cache
def _base_models() -> dict[str, Licence]:
    by_id = {licence.id: licence for licence in licences()}
    return {_folded(name): by_id[row["license"]] for row in _file()["base_model"] for name in row["names"]}


def _folded(text: str) -> str:
    """Keep letters and digits of every script, so that a remark in another language is not overlooked; `openrail++` is not `openrail`."""
    return "".join(c for c in text.casefold() if c.isalnum() or c == "+")


def _licence(row: dict[str, Any]) -> Licence:
    return Licence(
        id=row["id"],
        title=row["title"],
        url=row["url"],
        huggingface=row["huggingface"],
        license_name=row.get("license_name", ""),
        aliases=tuple(row.get("aliases", ())),
        terms=Terms(**{name: _value(value) for name, value in row.get("terms", {}).items()}),
        clauses=MappingProxyType(row.get("clauses", {})),
        note=row.get("note", ""),
    )


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Cap(amount=value["cap"], registered=frozenset(value["registered"]))
    return frozenset(value) if isinstance(value, list) else value
