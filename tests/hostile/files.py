"""Files that lie: every way in which a stranger's `.safetensors` can be wrong, as bytes, with what the refusal must say.

Nothing here is kept in the repository; tests write the files where they need them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["LIES", "UNUSUAL", "entry", "safetensors"]

WEIGHT = "model.diffusion_model.time_embed.0.weight"
BIAS = "model.diffusion_model.time_embed.0.bias"


@dataclass(frozen=True, slots=True)
class Lie:
    """A file that must be refused; the refusal holds every text of `says`."""

    make: Callable[[], bytes]
    says: tuple[str, ...]


def entry(begin: Any = 0, end: Any = 16, dtype: Any = "F32", shape: Any = (4,)) -> dict[str, Any]:
    """Make one tensor's entry in a header: unless said otherwise, four float32 numbers at the start."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def safetensors(header: Any, data: int = 16) -> bytes:
    """Put a header, as JSON or as raw bytes, in front of zeros."""
    raw = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def _claiming(length: int, rest: bytes = b"{}") -> Lie:
    return Lie(lambda: length.to_bytes(8, "little") + rest, (f"the header claims {length} bytes",))


def _header(header: Any, *says: str, data: int = 16) -> Lie:
    return Lie(lambda: safetensors(header, data), says)


def _one(*says: str, data: int = 16, **said: Any) -> Lie:
    """Make a file whose only tensor lies."""
    return _header({WEIGHT: entry(**said)}, f"tensor `{WEIGHT}`", *says, data=data)


def _two(second: dict[str, Any], says: str, data: int = 32) -> Lie:
    """Make a file whose second tensor lies."""
    return _header({WEIGHT: entry(), BIAS: second}, f"tensor `{BIAS}`", says, data=data)


def _named(name: str) -> Lie:
    return _header({name: entry()}, "tensor `", "has a name that is empty, longer than 1024, or not printable")


GOOD = json.dumps({WEIGHT: entry()})
TWICE = GOOD[:-1] + ", " + GOOD[1:]

LENGTHS = {
    "empty file": Lie(lambda: b"", ("0 bytes, too few for a safetensors file",)),
    "seven bytes": Lie(lambda: b"\2\0\0\0\0\0\0", ("7 bytes, too few for a safetensors file",)),
    "header length 0": _claiming(0),
    "header length 1": _claiming(1, b"{"),
    "header length 2^63": _claiming(2**63),
    "header length 2^64-1": _claiming(2**64 - 1),
    "header length over the cap": _claiming(100_000_001),
    "header past the end": _claiming(3),
    "header of the cap in a small file": _claiming(100_000_000),
    "pickle renamed": Lie(lambda: b"\x80\x02}q\0(X\n\0\0\0state_dictq\1", ("it looks like a .ckpt",)),
    "zip renamed": Lie(lambda: b"PK\x03\x04\0\0\x08\x08\0\0archive/data.pkl", ("it looks like a .ckpt",)),
    "login page": Lie(lambda: b"\n<!DOCTYPE html><html><body>Please log in</body></html>", ("it is a web page",)),
    "login page without doctype": Lie(lambda: b"<html><head><title>Sign in</title></head></html>", ("it is a web page",)),
    "lfs pointer": Lie(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ("it is a Git LFS pointer",)),
}

TEXTS = {
    "leading space": _header(b" " + GOOD.encode(), "the header does not begin with `{`"),
    "byte order mark": _header(b"\xef\xbb\xbf" + GOOD.encode(), "the header does not begin with `{`"),
    "header is a list": _header(b"[]", "the header does not begin with `{`", data=0),
    "header is nothing but commas": Lie(lambda: safetensors(b"," * 40_000_000, 0), ("the header does not begin with `{`",)),
    "forty megabytes of commas": Lie(lambda: safetensors(b"{" + b"," * 40_000_000, 0), ("the header has more than 500000 fields",)),
    "a million fields": Lie(lambda: safetensors(b"{" + b'"":0,' * 1_000_000 + b'"":0}', 0), ("the header has more than 500000 fields",)),
    "a million empty lists": Lie(lambda: safetensors(b'{"":[' + b"[]," * 1_000_000 + b"[]]}", 0), ("tensor ``",)),
    "utf-16": _header(GOOD.encode("utf-16-le"), "the header is not valid JSON"),
    "not utf-8": _header(GOOD.encode().replace(b"time", b"t\xffme"), "the header is not valid JSON"),
    "trailing nul": _header(GOOD.encode() + b"\0", "the header is not valid JSON"),
    "trailing bracket": _header(GOOD.encode() + b"}", "the header is not valid JSON"),
    "cut short": _header(GOOD.encode()[:-1], "the header is not valid JSON"),
    "single quotes": _header(b"{'a': 1}", "the header is not valid JSON", data=0),
    "5000 deep": _header(b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "the header is not valid JSON", data=0),
    "5000 tables deep": _header(b'{"a": ' * 5000 + b"1" + b"}" * 5000, "the header is not valid JSON", data=0),
    "5000 digits": _header(GOOD.replace("[4]", f"[{'9' * 5000}]").encode(), "the header is not valid JSON"),
    "duplicate tensor": _header(TWICE.encode(), f"the header names `{WEIGHT}` twice"),
    "duplicate dtype": _header(GOOD.replace('"dtype"', '"dtype": "F16", "dtype"').encode(), "the header names `dtype` twice"),
}

METADATA = {
    "duplicate metadata": _header(('{"__metadata__": {}, "__metadata__": {}, ' + GOOD[1:]).encode(), "the header names `__metadata__` twice"),
    "duplicate metadata entry": _header(
        ('{"__metadata__": {"format": "pt", "format": "np"}, ' + GOOD[1:]).encode(),
        "the header names `format` twice",
    ),
    "metadata is a list": _header({"__metadata__": ["pt"], WEIGHT: entry()}, "`__metadata__` is not a table"),
    "metadata is null": _header({"__metadata__": None, WEIGHT: entry()}, "`__metadata__` is not a table"),
    "metadata holds a number": _header({"__metadata__": {"epoch": 3}, WEIGHT: entry()}, "`__metadata__` holds `epoch`, which is not text"),
    "metadata holds a table": _header({"__metadata__": {"format": {}}, WEIGHT: entry()}, "`__metadata__` holds `format`, which is not text"),
    "metadata holds half a character": _header(('{"__metadata__": {"title": "\\ud800"}, ' + GOOD[1:]).encode(), "`title`"),
    "metadata key is half a character": _header(('{"__metadata__": {"\\udc00": "pt"}, ' + GOOD[1:]).encode(), "\\udc00"),
}

ENTRIES = {
    "entry is null": _header({WEIGHT: None}, f"tensor `{WEIGHT}` must have exactly `dtype`, `shape` and `data_offsets`"),
    "entry is a list": _header({WEIGHT: [0, 16]}, f"tensor `{WEIGHT}` must have exactly `dtype`, `shape` and `data_offsets`"),
    "extra field": _header({WEIGHT: entry() | {"payload": "x"}}, f"tensor `{WEIGHT}` must have exactly `dtype`, `shape` and `data_offsets`"),
    "missing dtype": _header({WEIGHT: {"shape": [4], "data_offsets": [0, 16]}}, f"tensor `{WEIGHT}` must have exactly"),
    "missing shape": _header({WEIGHT: {"dtype": "F32", "data_offsets": [0, 16]}}, f"tensor `{WEIGHT}` must have exactly"),
    "missing offsets": _header({WEIGHT: {"dtype": "F32", "shape": [4]}}, f"tensor `{WEIGHT}` must have exactly"),
    "unknown dtype": _one("has dtype `F31`, which is not known", dtype="F31"),
    "torch dtype": _one("has dtype `float32`, which is not known", dtype="float32"),
    "lowercase dtype": _one("has dtype `f32`, which is not known", dtype="f32"),
    "half a byte per number": _one("has dtype `F4`, which is not known", end=2, data=2, dtype="F4"),
    "dtype is a number": _one("has dtype `32`, which is not known", dtype=32),
    "dtype is a list": _one("has dtype `['F32']`, which is not known", dtype=["F32"]),
    "shape is a number": _one("has a shape that is not a list of sizes", shape=4),
    "shape is a text": _one("has a shape that is not a list of sizes", shape="4"),
    "negative size": _one("has a shape that is not a list of sizes", shape=(-2, -2)),
    "fractional size": _one("has a shape that is not a list of sizes", shape=(4.0,)),
    "true for a size": _one("has a shape that is not a list of sizes", end=4, data=4, shape=(True,)),
    "shape of 2^63": _one("has a shape that is not a list of sizes", shape=(2**63,)),
    "shape overflows to what is there": _one(shape=(2**62, 4, 4)),
    "shape overflows to zero": _one(end=0, data=0, shape=(2**62, 4)),
    "shape overflows before a zero": _one(end=0, data=0, shape=(2**62, 2**62, 0)),
    "32 dimensions of 2^62": _one(shape=(2**62,) * 32),
    "33 dimensions": _one("has a shape that is not a list of sizes", end=4, data=4, shape=(1,) * 33),
    "shape larger than offsets": _one("is F32 5, 20 bytes, but its offsets span 16", shape=(5,)),
    "shape smaller than offsets": _one("is F32 scalar, 4 bytes, but its offsets span 16", shape=()),
    "negative offset": _one("has offsets that are not two positions", begin=-16, end=0),
    "fractional offset": _one("has offsets that are not two positions", end=16.0),
    "false for an offset": _one("has offsets that are not two positions", begin=False),
    "text for an offset": _one("has offsets that are not two positions", end="16"),
    "infinite offset": _one("has offsets that are not two positions", end=float("inf")),
    "offset of 2^63": _one("has offsets that are not two positions", begin=2**63, end=2**63 + 16),
    "one offset": _header({WEIGHT: entry() | {"data_offsets": [16]}}, f"tensor `{WEIGHT}` has offsets that are not two positions"),
    "three offsets": _header({WEIGHT: entry() | {"data_offsets": [0, 8, 16]}}, f"tensor `{WEIGHT}` has offsets that are not two positions"),
    "offsets backwards": _one("its offsets span -16", begin=16, end=0),
}

PLACES = {
    "truncated": _header({WEIGHT: entry()}, "the file is truncated: its tensors need 16 bytes of data, but it has 15", data=15),
    "no data at all": _header({WEIGHT: entry()}, "the file is truncated", data=0),
    "trailing byte": _header({WEIGHT: entry()}, "1 bytes follow the last tensor", data=17),
    "data without tensors": _header({}, "16 bytes follow the last tensor"),
    "hole at the start": _one("leaves a hole before it", data=24, begin=8, end=24),
    "hole in the middle": _two(entry(24, 40), "leaves a hole before it", data=40),
    "overlap": _two(entry(8, 24), "overlaps the one before it", data=24),
    "same range": _header({WEIGHT: entry(), BIAS: entry()}, "overlaps the one before it: it begins at 0, not at 16"),
    "inside another": _two(entry(4, 8, shape=(1,)), "overlaps the one before it", data=16),
    "nothing, far away": _two(entry(2**40, 2**40, shape=(0,)), "leaves a hole before it", data=16),
}

NAMES = {
    "empty name": _named(""),
    "name with nul": _named("model.a\0.weight"),
    "name with a line break": _named("model\nerror: all is well"),
    "name with an escape sequence": _named("\x1b[2J\x1b[31mweight"),
    "name that reads backwards": _named("model.\u202ethgiew"),
    "name of half a character": _header(('{"\\ud800": ' + json.dumps(entry()) + "}").encode(), "\\ud800"),
    "name of 1025 characters": _named("a" * 1025),
    "name of 2000 characters": _named("b" * 2000),
}

LIES: dict[str, Lie] = LENGTHS | TEXTS | METADATA | ENTRIES | PLACES | NAMES

UNUSUAL: dict[str, bytes] = {
    "no tensors": safetensors({}, 0),
    "metadata alone": safetensors({"__metadata__": {"format": "pt"}}, 0),
    "trailing white space": safetensors(GOOD.encode() + b" \n\t\r"),
    "scalar": safetensors({WEIGHT: entry(0, 4, shape=())}, 4),
    "nothing in it": safetensors({WEIGHT: entry(0, 0, shape=(0, 3))}, 0),
    "nothings that share a place": safetensors({WEIGHT: entry(), "a": entry(16, 16, shape=(0,)), "b": entry(0, 0, shape=(0, 9))}),
    "32 dimensions": safetensors({WEIGHT: entry(0, 4, shape=(1,) * 32)}, 4),
    "listed back to front": safetensors({BIAS: entry(16, 32), WEIGHT: entry()}, 32),
    "odd offsets": safetensors({WEIGHT: entry(1, 17), BIAS: entry(0, 1, "U8", (1,))}, 17),
    "name of 1024 characters": safetensors({"c" * 1024: entry()}),
    "name in Japanese": safetensors({"モデル.重み": entry()}),
    "name of an upper folder": safetensors({"../../etc/passwd": entry()}),
    "name of a Windows device": safetensors({"C:\\CON": entry()}),
    "name with a dollar": safetensors({"$(rm -rf ~)": entry()}),
}
"""Files that look odd and are right: names of tensors are never used as paths, for one."""
