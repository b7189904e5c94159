"""Owns TOML text from strangers: reads it within limits, and remembers on which line each table and field stands.

Has never heard of what a recipe means.
Limits and traps: tomllib accepts `nan` and `1e999`, and needs seconds or a deep stack for nested brackets and long dotted keys.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdmerge_build.errors import Issue, RecipeError

__all__ = ["Lines", "read_toml", "too_deep"]

MAX_BYTES = 1 << 20
MAX_NESTING = 32
MAX_DOTS = 16
MAX_NUMBER = 2**63
Address = tuple[str | int, ...]

_HEADER = re.compile(r"""\s*(\[{1,2}(?:[^\[\]"']|"(?:[^"\\]|\\.)*"|'[^']*')+\]{1,2})\s*(?:#.*)?$""")
_FIELD = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*'))*)\s*=""")


class Lines:
    """Where in a file things stand, for messages."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self.text = text

    @functools.cached_property
    def _lines(self) -> dict[Address, int]:
        """Find every table and field; only when a message needs it."""
        lines: dict[Address, int] = {}
        table: Address = ()
        for number, line in enumerate(_without_long_texts(self.text).split("\n"), 1):
            if header := _HEADER.match(line):
                table = _address(header[1]) or table
                lines.setdefault(table, number)
            elif field := _FIELD.match(line):
                lines.setdefault(table + _address(f"{field[1]} = 0"), number)
        return lines

    def where(self, *address: str | int) -> str:
        """Name the file and the line of a table or field, or of the nearest thing around it."""
        inside = (line for place, line in self._lines.items() if address and place[: len(address)] == address)
        around = (self._lines.get(address[:end], 0) for end in range(len(address) - 1, 0, -1))
        line = self._lines.get(address) or min(inside, default=0) or next(filter(None, around), 0)
        if line:
            return f"{self._path}:{line}"
        return str(self._path)


def read_toml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Read a TOML file of at most 1 MiB; anything wrong with its text is one `RecipeError` that names the place."""
    text = _read_text(path)
    where = str(path)
    if complaint := too_deep(text):
        raise RecipeError(Issue(where=where, what=complaint))
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+), ", place)
        raise RecipeError(
            Issue(where=f"{where}:{line[1] if line else text.count(chr(10)) + 1}", what=_lowercase(what), hint=_advice(what))
        ) from error
    except (ValueError, RecursionError) as error:
        what = "a number has too many digits" if "digits" in str(error) else f"cannot be read as TOML: {error}"
        raise RecipeError(Issue(where=where, what=what)) from error
    lines = Lines(path, text)
    if issues := [
        Issue(where=lines.where(*address), what=f"`{[part for part in address if isinstance(part, str)][-1]}` is {_kind_of(value)}")
        for address, value in _numbers(table)
        if (abs(value) >= MAX_NUMBER if isinstance(value, int) else not math.isfinite(value))
    ]:
        raise RecipeError(*issues)
    return table, lines


def _read_text(path: Path) -> str:
    where = str(path)
    try:
        if not path.is_file() and path.exists():
            raise RecipeError(Issue(where=where, what="is not a file"))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(Issue(where=where, what="is larger than 1 MiB, too large for a recipe"))
        return raw.decode("utf-8-sig")  # Windows Notepad writes a byte order mark, which tomllib refuses
    except FileNotFoundError:
        raise RecipeError(Issue(where=where, what="there is no such recipe")) from None
    except OSError as error:
        raise RecipeError(Issue(where=where, what=f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        raise RecipeError(Issue(where=where, what=f"is not UTF-8 text: {error.reason} at byte {error.start}")) from error


def too_deep(text: str) -> str:
    """Walk the text once, past strings and comments, and say which limit it breaks. A pattern would be shorter, and quadratic on hostile text."""
    depth = dots = at = 0
    while at < len(text):
        sign = text[at]
        if sign in "\"'":
            at = _end_of_string(text, at)
        elif sign == "#":
            at = min(end for end in (text.find("\n", at), len(text)) if end >= 0)
            continue
        elif sign in "[]{}":
            depth += 1 if sign in "[{" else -1
            dots = 0
        elif sign in "=,\n":
            dots = 0
        elif sign == ".":
            dots += 1
        if depth > MAX_NESTING:
            return f"brackets are nested more than {MAX_NESTING} deep"
        if dots >= MAX_DOTS:
            return f"a dotted name has more than {MAX_DOTS} parts"
        at += 1
    return ""


def _end_of_string(text: str, start: int) -> int:
    """Return the position of the last sign of the string that begins at `start`; the text's end when it is never closed."""
    mark = text[start] * 3 if text.startswith(text[start] * 3, start) else text[start]
    at = start + len(mark)
    while (at := text.find(mark, at)) >= 0:
        before = at
        while mark[0] == '"' and text[before - 1] == "\\":
            before -= 1
        if (at - before) % 2 == 0:
            end = at + len(mark)
            while len(mark) == 3 and end < at + 5 and text.startswith(mark[0], end):  # up to two quotes may stand before the closing three
                end += 1
            return end - 1
        at += 1
    return len(text)


def _without_long_texts(text: str) -> str:
    """Empty the texts between triple quotes, keeping their line ends, so that nothing in them is taken for a table."""
    kept: list[str] = []
    at = since = 0
    while at < len(text):
        if text[at] == "#":
            end = text.find("\n", at)
            at = end if end >= 0 else len(text)
        elif text[at] in "\"'":
            end = _end_of_string(text, at)
            if text.startswith(text[at] * 3, at):
                kept += [text[since:at], "\n" * text.count("\n", at, end)]
                since = end + 1
            at = end + 1
        else:
            at += 1
    return "".join([*kept, text[since:]])


def _kind_of(value: float) -> str:
    return f"{value}, not a finite number" if isinstance(value, float) and not math.isfinite(value) else "larger than any number here may be"


def _numbers(value: Any, address: Address = ()) -> Iterator[tuple[Address, float]]:
    if isinstance(value, (int, float)):
        yield address, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, (*address, key))
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from _numbers(item, (*address, n))


def _address(line: str) -> Address:
    """Parse one table header or one `key = 0` line into its address."""
    try:
        value: Any = tomllib.loads(line)
    except (tomllib.TOMLDecodeError, RecursionError):
        return ()
    address: list[str | int] = []
    while isinstance(value, (dict, list)) and value:
        if isinstance(value, list):
            value = value[0]
            continue
        key, value = next(iter(value.items()))
        address.append(key)
    return tuple(address)


def _advice(complaint: str) -> str:
    """Say what people usually meant by what tomllib refuses."""
    if "\\" in complaint or "escape" in complaint.lower():
        return "in a path write / for \\, or put it in single quotes"
    if complaint.startswith(("Invalid value", "Expected newline")):
        return "text stands in quotes, names with spaces too; numbers are written 0.5, not .5 or 0,5"
    return ""


def _lowercase(message: str) -> str:
    return message[:1].lower() + message[1:]
