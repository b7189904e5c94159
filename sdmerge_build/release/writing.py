"""Owns how texts of strangers are written into documents: one line of prose, Markdown, an address, a file name, JSON.

Has never heard of manifests. Names, credits and addresses come from people nobody has met; here they lose the power to be anything but text.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from sdmerge_build.errors import printable

__all__ = ["address", "canonical", "code", "code_block", "file_name", "link", "markdown", "one_line", "sound"]

_ADDRESS = re.compile(r"(https?://[A-Za-z0-9.-]{1,253}(?::\d{1,5})?)((?:/[^?#]*)?)(\?[^#]*)?(#.*)?", re.ASCII | re.DOTALL)
_SPECIAL = re.compile(r"[`*_\[\]{}<>#|~^$@&!]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_LEADING = re.compile(r"([-+=])|(\d{1,9})([.)])(?=\s|$)")
_DEVICES = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")


def sound(value: Any) -> Any:
    """Copy a manifest in which every text can be encoded; half a surrogate pair, which JSON of a hub may hold, cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {sound(key): sound(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [sound(item) for item in value]
    return value


def one_line(text: object) -> str:
    r"""Write a text on one line, without anything that a terminal or a parser obeys.

    >>> one_line("by\tMeina \n")
    'by Meina'
    """
    return printable(" ".join(str(text).split()))


def markdown(text: object) -> str:
    r"""Write a text so that Markdown shows it and does nothing else: no link, mention, image, HTML, heading or list.

    >>> markdown("viewer-mix_v1.7 <b>"), markdown("1. first")
    ('viewer-mix\\_v1.7 \\<b\\>', '1\\. first')
    """
    # a backslash becomes an entity: escaped by another one it would open a formula on Hugging Face
    escaped = "&#92;".join(_SPECIAL.sub(r"\\\g<0>", part) for part in one_line(text).split("\\"))
    return _LEADING.sub(lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", escaped, count=1) if _LEADING.match(escaped) else escaped


def code(text: object) -> str:
    """Write a code span, whatever backticks the text holds; for the inside of paragraphs and lists, not of tables."""
    line = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if line.startswith("`") or line.endswith("`") else f"{fence}{line}{fence}" if line else ""


def code_block(text: object) -> str:
    """Write one line as a block of code."""
    line = one_line(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}\n{line}\n{fence}"


def address(url: object) -> str:
    """Write a web address as RFC 3986 has it; empty for what is none, and for addresses with a user, which only deceive."""
    match = _ADDRESS.fullmatch(str(url))
    if not match:
        return ""
    path, query, fragment = (_quoted(part or "") for part in match.groups()[1:])
    return match[1] + path + (f"?{query[1:]}" if query else "") + (f"#{fragment[1:]}" if fragment else "")


def _quoted(part: str) -> str:
    """Quote what may not stand behind an address's host; percent signs that quote already are kept."""
    head, tail = part[:1], part[1:]
    pieces = re.split(r"(%[0-9A-Fa-f]{2})", tail)
    return head + "".join(piece if n % 2 else quote(piece, safe="/?:@!$&'*+,;=-._~", errors="backslashreplace") for n, piece in enumerate(pieces))


def link(text: object, url: object) -> str:
    """Write a link, or the text by itself where the address is none."""
    href = address(url)
    return f"[{markdown(text)}]({href.replace('&', '&amp;')})" if href else markdown(text)


def file_name(text: object) -> str:
    """Make a name that every file system takes from any text; texts that are names already are kept.

    >>> file_name("LicenseRef-CreativeML-OpenRAIL-M"), file_name("../../etc/passwd"), file_name("nul.txt")
    ('LicenseRef-CreativeML-OpenRAIL-M', 'etc-passwd', '_nul.txt')
    """
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", str(text)).lstrip(".+-").rstrip(".-")
    if not name:
        name = f"unnamed-{sha256(str(text).encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
    name = f"{name[:100]}-{sha256(name.encode()).hexdigest()[:8]}" if len(name) > 120 else name
    return f"_{name}" if _DEVICES.fullmatch(name) else name


def canonical(value: Any) -> str:
    """Write JSON on one line, sorted; characters that turn or hide what a reader sees are written as escapes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
