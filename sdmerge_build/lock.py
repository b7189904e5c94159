"""Owns the lock: what each source of a recipe was when somebody said `sdbuild lock`, in a file beside the recipe that the tool writes.

Has never heard of the network or the store. Sorted, without a clock: the same sources make the same text.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sdmerge_build.digest import blake3_hex, is_hex
from sdmerge_build.errors import Issue, RecipeError
from sdmerge_build.files import as_space_error, read_regular, replacing
from sdmerge_build.recipe import SourceTable
from sdmerge_build.tomltext import too_deep

__all__ = ["Entry", "Lock", "lock_path", "read_lock", "write_lock"]

VERSION = 1
MAX_BYTES = 16 << 20
MAX_LINES = 200_000  # a thousand times what recipes need; keeps a hostile file from being read for minutes
_DIGESTS = {"sha256", "blake3", "tensor_digest", "made"}
_KINDS = {"", "pickle", "shards", "diffusers"}
_SAID = ("uri", "path", "size", "sha256", "blake3")  # what a recipe says that decides which bytes a source is


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One source: where it lies for good, what its bytes are, what its header claims, and the hub's terms that day."""

    tensor_digest: str
    uri: str = ""
    path: str = ""
    named: str = ""  # the filename that the recipe says; `filename` is the hub's
    address: str = ""
    page: str = ""
    revision: str = ""
    filename: str = ""
    size: int = 0
    sha256: str = ""
    blake3: str = ""
    kind: str = ""  # what it must be converted from; nothing for a safetensors file
    made: str = ""  # under which digest the store keeps what several files were put together into
    claims: Mapping[str, str] = field(default_factory=dict)  # header metadata that goes into lineages
    terms: Mapping[str, Any] = field(default_factory=dict)  # the hub's licence fields, as it gave them

    def table(self) -> dict[str, Any]:
        """Write the entry as a table, sorted, without what is not known."""
        table = {f.name: value for f in fields(self) if (value := getattr(self, f.name))}
        if self.terms:
            table["terms"] = dict(sorted(self.terms.items())) | {"digest": _digest_of(self.terms)}
        if self.claims:
            table["claims"] = dict(sorted(self.claims.items()))
        return dict(sorted(table.items(), key=lambda item: (isinstance(item[1], dict), item[0])))

    def differences(self, source: SourceTable) -> Iterator[str]:
        """Say what a recipe says of the source now that it did not say then: `sha256 = old → new`. Pins that were left out still hold.

        A filename decides which bytes a source is only where no digest does.
        """
        for name in _SAID:
            was, now = getattr(self, name), getattr(source, name)
            was, now = (was.lower(), now and now.lower()) if name in _DIGESTS else (was, now)
            if now != was and not (now is None and name not in {"uri", "path"}) and (now or was):
                yield f"{name} = {was or '(none)'} → {now if now is not None else '(none)'}"
        if not (source.sha256 or source.blake3) and self.named.casefold() != (source.filename or "").casefold():
            yield f"filename = {self.named or '(none)'} → {source.filename or '(none)'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A lock, whole; without a file, it is empty."""

    path: Path
    exists: bool
    entries: Mapping[str, Entry]


def lock_path(recipe: Path) -> Path:
    """Name the lock of a recipe: `NAME.lock` beside `NAME.toml`."""
    return recipe.with_suffix(".lock")


def read_lock(path: Path) -> Lock:
    """Read a lock. Raises `RecipeError` when something is there that is no lock, or was edited."""
    try:
        text = read_regular(path, MAX_BYTES).decode()
    except FileNotFoundError:
        return Lock(path=path, exists=False, entries={})
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise _refusal(path, "is not UTF-8 text") from None
    if complaint := too_deep(text) or ("has more lines than any lock" if text.count("\n") > MAX_LINES or text.count(",") > MAX_LINES else ""):
        raise _refusal(path, complaint)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"is not TOML: {error}") from None
    version, sources = table.get("lock"), table.get("source", {})
    if type(version) is not int or version != VERSION or not isinstance(sources, dict) or table.keys() - {"lock", "source"}:
        raise _refusal(path, f"is not a lock of version {VERSION}")
    issues: list[Issue] = []
    entries = {name: entry for name, said in sources.items() if (entry := _entry(path, name, said, issues))}
    if issues:
        raise RecipeError(*issues)
    return Lock(path=path, exists=True, entries=entries)


def write_lock(path: Path, entries: Mapping[str, Entry]) -> bool:
    """Write a lock by one rename; leave it alone when it says the same already. Return whether it was written."""
    import tomli_w  # noqa: PLC0415  a build needs no writer

    text = "# Written by sdbuild lock: what each source was that day. Keep it beside the recipe.\n"
    text += tomli_w.dumps({"lock": VERSION, "source": {name: entries[name].table() for name in sorted(entries)}})
    data = text.encode()
    try:
        if read_regular(path) == data:
            return False
    except OSError:
        pass
    with as_space_error(path.parent, len(data)), replacing(path) as file:
        file.write(data)
    return True


def _refusal(path: Path, what: str) -> RecipeError:
    return RecipeError(Issue(where=str(path), what=what, hint="remove it, and run `sdbuild lock` again"))


def _entry(path: Path, name: str, said: Any, issues: list[Issue]) -> Entry | None:
    """Read one entry, or say what is wrong with it."""
    known = {f.name: f for f in fields(Entry)}
    wrong = []
    if not isinstance(said, dict):
        wrong.append("is not a table")
        said = {}
    terms = dict(said.get("terms", {})) if isinstance(said.get("terms", {}), dict) else {}
    digest = terms.pop("digest", None)
    if (terms or digest is not None) and digest != _digest_of(terms):
        wrong.append("has `terms` that are not the ones their digest was made of")
    for key, value in said.items():
        kind = int if key == "size" else dict if key in {"claims", "terms"} else str
        if key not in known:
            wrong.append(f"has an unknown field `{key}`")
        elif type(value) is not kind or not _is_sound(key, value):
            wrong.append(f"has a `{key}` that cannot be read")
        elif key == "claims" and isinstance(value, dict) and not all(isinstance(text, str) for text in value.values()):
            wrong.append("has `claims` that are not texts")
    if "tensor_digest" not in said and not wrong:
        wrong.append("lacks `tensor_digest`")
    if said.get("made") and said.get("kind") not in {"shards", "diffusers"}:
        wrong.append("has `made`, but is one file")
    issues += [Issue(where=str(path), what=f"the entry of source `{name}` {what}", hint="run `sdbuild lock` again") for what in wrong]
    return None if wrong else Entry(**{**said, "terms": terms})


def _is_sound(key: str, value: Any) -> bool:
    """Tell whether a value, which is of the right type, can be one of its field."""
    match key:
        case "size":
            return bool(0 <= value < 2**63)
        case "kind":
            return value in _KINDS
        case "address":
            return _is_address(value)
        case "revision":
            return re.fullmatch("[0-9a-f]{40}|", value) is not None
    return key not in _DIGESTS or is_hex(value)


def _is_address(text: str) -> bool:
    """Tell whether a text is the address of a file that can be asked for."""
    try:
        parts = urlsplit(text)
        return parts.scheme == "https" and bool(parts.hostname) and parts.port != 0 and text.isascii() and text.isprintable()
    except ValueError:
        return False


def _digest_of(terms: Mapping[str, Any]) -> str:
    return blake3_hex(json.dumps(terms, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode())
