"""Owns how recipes name blocks: one by one, as ranges, as globs, and as another tool counts them.

Has never heard of values. A place is a block without its parts, or a part: every tensor is in exactly one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from sdmerge_build.architectures import BASE, Architecture
from sdmerge_build.errors import nearest
from sdmerge_build.weights.number import RatioError

__all__ = ["named", "owners", "places", "spelled"]

_GLOB = frozenset("*?[")


def places(architecture: Architecture) -> tuple[str, ...]:
    """List the places of an architecture: its blocks, then their parts; one without blocks is all BASE."""
    return (*(architecture.blocks or (BASE,)), *architecture.parts)


def owners(said: Any, architecture: Architecture) -> dict[str, str]:
    """Tell which block each part follows: the architecture's, or as the named map counts them; none where that leaves it unmerged."""
    counted = {part: block for part, (block, _) in architecture.parts.items()}
    if said is None:
        return counted
    if not isinstance(said, str) or said not in architecture.maps:
        shown = f"`{said}`" if isinstance(said, str) else repr(said)[:40]
        known = f"its maps are {', '.join(architecture.maps)}" if architecture.maps else "leave out `map`"
        raise RatioError(f"has the map {shown}, which {architecture.title} does not have", nearest(str(said), architecture.maps) or known)
    return {**counted, **architecture.maps[said]}


def named(pattern: str, architecture: Architecture, *, has_globs: bool = True) -> set[str]:
    """Find what a pattern names: a block or part, a range of blocks such as `IN05-IN08`, or a glob. Raises `RatioError`."""
    blocks, known = list(architecture.blocks), [*architecture.blocks, *architecture.parts]
    first, dash, last = pattern.partition("-")
    if dash and first in blocks and last in blocks:
        low, high = sorted((blocks.index(first), blocks.index(last)))
        return set(blocks[low : high + 1])
    is_glob = has_globs and _GLOB & set(pattern)
    names = {name for name in known if name == pattern or (is_glob and fnmatchcase(name, pattern))}
    if not names:
        message = f"names block `{pattern}`, which {architecture.title} does not have"
        if _GLOB & set(pattern) and not has_globs:
            raise RatioError(message, "globs mean nothing here; write a range such as `IN00-IN05`")
        if dash and first in blocks and first.rstrip("0123456789") == last.rstrip("0123456789"):
            kin = [block for block in blocks if block.rstrip("0123456789") == first.rstrip("0123456789")]
            raise RatioError(message, f"the last of them is `{kin[-1]}`")
        listed = f"`sdbuild methods --blocks {architecture.name}` lists its blocks"
        raise RatioError(message, nearest(pattern, known) or (listed if known else "use `rules`"))
    return names


def spelled(held: Collection[str], architecture: Architecture) -> str:
    """Write places as an entry names them, in one way: ranges, `NOT` where BASE is among them, `!PART` for one that stays behind."""
    everywhere = places(architecture)
    if set(held) == set(everywhere):
        return ""
    is_not = BASE in held
    chosen = {place for place in everywhere if (place in held) != is_not}
    strays = [("" if part in chosen else "!") + part for part, (block, _) in architecture.parts.items() if (part in chosen) != (block in chosen)]
    return " ".join([*(["NOT"] if is_not else []), *_runs(chosen, architecture.blocks), *strays])


def _runs(chosen: set[str], blocks: Mapping[str, Any]) -> Iterator[str]:
    """Join neighbours into ranges."""
    run: list[str] = []
    for block in (*blocks, ""):
        if block in chosen:
            run.append(block)
        elif run:
            yield run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}"
            run = []
