"""Owns identity: how facts become a key and how tensors become one digest.

Has never heard of files, recipes or torch; it sees names, values and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol

from blake3 import blake3

__all__ = ["Digest", "Sink", "TensorRow", "Transcript", "blake3_hex", "is_hex", "tensor_digest"]

TensorRow = tuple[str, str, tuple[int, ...], str]
"""A tensor as its digest sees it: name, safetensors dtype, shape, blake3 of its bytes in hex."""


class Sink(Protocol):
    """Hears the facts that make up a key."""

    def fact(self, name: str, value: str) -> None:
        """Hear one fact; the order of facts counts."""


class Digest:
    """A sink that hashes what it hears; each part is length-prefixed, so no two lists of facts collide."""

    def __init__(self) -> None:
        self._hasher = blake3()

    def fact(self, name: str, value: str) -> None:
        """Hash one fact."""
        for part in (name.encode(), value.encode()):
            self._hasher.update(len(part).to_bytes(8, "little"))
            self._hasher.update(part)

    def hexdigest(self) -> str:
        """Return the 64 hex digits of everything heard so far."""
        return self._hasher.hexdigest()


class Transcript:
    """A sink that remembers what it hears, for explanations and traces."""

    def __init__(self) -> None:
        self.facts: list[tuple[str, str]] = []

    def fact(self, name: str, value: str) -> None:
        """Remember one fact."""
        self.facts.append((name, value))


def is_hex(value: object) -> bool:
    """Tell whether a value is 64 hex digits, as every digest and key is."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def blake3_hex(data: bytes) -> str:
    """Hash a short piece of bytes."""
    return blake3(data).hexdigest()


def tensor_digest(rows: Iterable[TensorRow]) -> str:
    """Digest a state dict, whatever order, offsets or header its file has.

    Names, dtypes and shapes count, unlike in AutoV3 and `modelspec.hash_sha256`, which two different state dicts can share.
    """
    digest = Digest()
    for name, dtype, shape, content in sorted(rows):
        digest.fact(name, f"{dtype} {'x'.join(map(str, shape))} {content}")
    return digest.hexdigest()
