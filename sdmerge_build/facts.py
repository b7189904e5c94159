"""Owns what is known of a source, whether its bytes are here or not: digests, what its header claims, the hub's terms.

Has never heard of how it became known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sdmerge_build.adapters import SETTINGS
from sdmerge_build.claims import CLAIMS, MAX_CLAIM
from sdmerge_build.lock import Entry
from sdmerge_build.sources import Found

__all__ = ["Facts", "claims_in"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a source, whether its bytes are here or not."""

    tensors: str  # the digest that keys stand on
    size: int
    sha256: str | None
    blake3: str | None
    kind: str  # what it is converted from; nothing for a safetensors file
    made: str  # under which digest the store keeps what several files were put together into
    claims: Mapping[str, str]
    terms: Mapping[str, Any] = field(default_factory=dict)  # the hub's licence fields, as the lock has them

    @property
    def settings(self) -> str:
        """Return what the header of an adapter says of how strongly it is applied; nothing where it says nothing."""
        return self.claims.get(SETTINGS, "")

    @classmethod
    def of(cls, found: Found, entry: Entry | None = None) -> Facts:
        """Take the facts of a file; the hub's terms are the lock's to know."""
        claims = claims_in(found.header.metadata)
        digests = found.digests
        kind = "" if found.kind == "safetensors" else found.kind
        made = found.path.name.partition(".")[0] if kind in {"shards", "diffusers"} else ""
        return cls(
            tensors=digests.tensors,
            size=found.size,
            sha256=digests.sha256,
            blake3=digests.blake3,
            kind=kind,
            made=made,
            claims=claims,
            terms=entry.terms if entry else {},
        )

    @classmethod
    def locked(cls, entry: Entry) -> Facts:
        """Take the facts of a lock's entry."""
        sha256, blake3 = entry.sha256 or None, entry.blake3 or None
        return cls(
            tensors=entry.tensor_digest,
            size=entry.size,
            sha256=sha256,
            blake3=blake3,
            kind=entry.kind,
            made=entry.made,
            claims=entry.claims,
            terms=entry.terms,
        )

    def changes(self, now: Facts) -> Iterator[str]:
        """Say which facts are others now: `size = 20208 → 20216`; a digest that is not known is not another one."""
        for name in (f.name for f in fields(self)):
            was, is_now = getattr(self, name), getattr(now, name)
            if was != is_now and was is not None and is_now is not None:
                yield "what its header claims of its origin" if name == "claims" else f"{name} = {was or '(none)'} → {is_now or '(none)'}"


def claims_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """Take what a header claims of its origin, or says of an adapter's strength; of what is too long to be read, that it is."""
    said = ((name, metadata.get(name)) for name in (*CLAIMS, SETTINGS))
    return {name: text if len(text) <= MAX_CLAIM else f"… {len(text)} characters" for name, text in said if text is not None}
