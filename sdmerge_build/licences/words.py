"""Owns the words for what conclusions say in identifiers, for people who have never read a licence.

Has never heard of how conclusions are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NAMES", "in_words"]

NAMES: Mapping[str, str] = {
    "use_restrictions": "forbidden uses",
    "weights_commercial": "commercial use of the model",
    "outputs_commercial": "commercial use of its images",
    "hosting": "who may run it for others",
    "sell_model": "selling the model",
    "sell_merge": "selling merges of it",
    "share_derivative": "sharing merges of it",
    "relicense": "other terms for merges of it",
    "license_copies": "copies of licences",
}
"""Components whose own names say little."""

_VALUES: Mapping[str, str] = {
    "railA:1..11": "the uses that Attachment A of the RAIL licence lists, items 1 to 11",
    "other-paid": "services that take a fee",
    "civitai": "Civitai's generator",
    "own-free": "one's own service, free of charge",
    "any": "any",
    "respect-use-restrictions": "any that keep the forbidden uses",
    "same-permissions": "the same permissions as the parents'",
    "same-licence": "the same licence, or one that allows all that it allows",
    "no-sublicense": "none: the owner grants its licence to each recipient directly",
    "no-competitor-training": "any but training models that compete",
}


def in_words(value: Any) -> str:
    """Write a concluded value for people: lists joined, truths as yes and no, identifiers as what they stand for."""
    if isinstance(value, list):
        return ", ".join(in_words(item) for item in value) or "nobody"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _VALUES.get(str(value), str(value))
