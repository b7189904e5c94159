"""Owns methods that are not built in: those of a Python file that a recipe names, and those of installed packages.

Has never heard of recipes. The content of a file is part of what keys know its methods by; what the file imports is not.
"""

from __future__ import annotations
import __future__

import contextlib
import functools
import hashlib
import importlib
import traceback
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from sdmerge_build.digest import blake3_hex
from sdmerge_build.methods import Method, collecting, methods

__all__ = ["GROUP", "OwnError", "installed_methods", "methods_in", "pin_of"]

GROUP = "sdbuild.methods"
"""The group of entry points by which packages offer methods: each names a module."""

MAX_FILE = 1 << 20


class OwnError(ValueError):
    """Methods cannot be read; `is_altered` when a file is not the one that was pinned."""

    def __init__(self, message: str, hint: str = "", *, is_altered: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.is_altered = is_altered


def methods_in(path: Path, sha256: str | None) -> dict[str, Method]:
    """Run a Python file, and return the methods it defines, by name; one that is pinned is compared first. Raises `OwnError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OwnError(f"cannot be read: {error.strerror}", "its place is seen from the recipe's folder") from None
    if len(content) > MAX_FILE:
        raise OwnError(f"is larger than {MAX_FILE} bytes")
    actual = hashlib.sha256(content).hexdigest()
    if sha256 and actual != sha256.lower():
        raise OwnError(f"has sha256 {actual}, not the pinned {sha256.lower()}", "read what changed before you pin it anew", is_altered=True)
    return _run(content, str(path), blake3_hex(content))


def pin_of(path: Path) -> str:
    """Return the sha256 of a file; nothing when it cannot be read."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return ""


@functools.cache
def _run(content: bytes, name: str, digest: str) -> dict[str, Method]:
    with collecting() as found:
        try:
            code = compile(content, name, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
            exec(code, {"__name__": f"sdbuild_methods_{digest[:12]}", "__file__": name})  # noqa: S102  the recipe asks for it
        except (Exception, SystemExit) as error:
            line = next((f":{frame.lineno}" for frame in reversed(_frames(error)) if frame.filename == name), "")
            hint = "write `@method(version=1)`, with its parentheses" if "method() takes 0 positional" in str(error) else ""
            raise OwnError(f"cannot be run: {type(error).__name__}{line}: {error}", hint) from error
    if not found:
        raise OwnError("defines no method", "a method is a function below `@method(version=1)`; `from sdmerge_build.methods import method`")
    if taken := [name for name in found if name in methods()]:
        raise OwnError(f"defines `{taken[0]}`, which is built in", "give it another name")
    return {name: replace(made, origin=f"blake3 {digest}") for name, made in found.items()}


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return [traceback.FrameSummary(error.filename, error.lineno, "", lookup_line=False)]
    return list(traceback.extract_tb(error.__traceback__))


@functools.cache
def installed_methods() -> Mapping[str, Method]:
    """Return the methods of installed packages, by name; the first of two with one name. Raises `OwnError`."""
    found: dict[str, Method] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.dist.name if p.dist else "", p.name)):
        for name, made in _offered(point).items():
            if name not in methods():
                found.setdefault(name, made)
    return found


def _offered(point: EntryPoint) -> dict[str, Method]:
    """Import a package's module and return its methods; its version and the module's content are what keys know them by."""
    with collecting() as found:
        try:
            module = point.load()
            if not found:  # somebody else imported it before
                importlib.reload(module)
            content = Path(str(module.__file__)).read_bytes()
        except Exception as error:
            raise OwnError(f"`{point.value}` cannot be imported: {type(error).__name__}: {error}", "uninstall or repair the package") from error
    dist = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
    return {name: replace(made, origin=f"{dist} blake3 {blake3_hex(content)}") for name, made in found.items()}
