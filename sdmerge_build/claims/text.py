"""Owns text from the headers of strangers: parses it within limits, and makes lines of it that a terminal and a file can hold.

Has never heard of what a header means.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from sdmerge_build.errors import printable

__all__ = ["MOST_MEMBERS", "TooDeepError", "cut", "encodable", "kept", "line", "parsed"]

_MOST_DEPTH = 64  # brackets; whoever writes what we read must not run out of stack either
_MOST_TEXT = 300
MOST_MEMBERS = 50  # of a table that is passed on as it is
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


class TooDeepError(ValueError):
    """Brackets within brackets within brackets."""


def parsed(text: str) -> Any:
    """Parse JSON of bounded depth; numbers that no float holds stay text. Raises ValueError, `TooDeepError` among them."""
    if text.count("[") + text.count("{") > _MOST_DEPTH:
        brackets = re.sub(r"[^\[\]{}]+", "", _STRING.sub("", text))
        if max(itertools.accumulate(1 if sign in "[{" else -1 for sign in brackets), default=0) > _MOST_DEPTH:
            raise TooDeepError(f"is nested more than {_MOST_DEPTH} deep")
    return json.loads(text, parse_int=_number(int), parse_float=_number(float), parse_constant=str)


def _number(kind: Callable[[str], float]) -> Callable[[str], float | str]:
    return lambda text: value if len(text) <= 40 and math.isfinite(value := kind(text)) else cut(text, 40)


def line(value: Any, most: int = _MOST_TEXT) -> str:
    """Write a value as one readable line: printable, encodable, short."""
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        value = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).translate(dict.fromkeys(map(ord, '[]{}"')))
    text = str(value)
    return cut(printable(" ".join(text[: 4 * most].split())) + "…" * (len(text) > 4 * most), most)


def cut(text: str, most: int = _MOST_TEXT) -> str:
    """Cut what is too long, and show it."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def kept(value: Any) -> dict[str, Any]:
    """Return a table that is passed on as it is, within limits; what is none, or beyond them, becomes `…`, so that nobody takes it for nothing."""
    kept = _plain(value, 3)
    return kept if isinstance(kept, dict) else {} if value is None else {"…": kept}


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return line(value)
    if not isinstance(value, (dict, list)):
        return value
    if not depth or len(value) > MOST_MEMBERS:
        return "…"
    if isinstance(value, list):
        return [_plain(item, depth - 1) for item in value]
    return {line(name): _plain(item, depth - 1) for name, item in sorted(value.items())}


def encodable(text: str) -> str:
    """Replace halves of characters, which JSON can spell and no file can hold."""
    return text.encode("utf-8", "replace").decode()
