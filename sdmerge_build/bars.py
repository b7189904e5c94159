"""Owns the picture of a ratio: its value in every block, as bars for people and as a table for programs.

Has never heard of terminals; it is told how wide a line may be, and what a bar is drawn with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdmerge_build.architectures import BASE, Architecture
from sdmerge_build.errors import printable
from sdmerge_build.plan import Plan
from sdmerge_build.weights.ratio import Ratio

__all__ = ["Style", "bars", "ratios_as_json"]

_INDENT = "    "
_WIDEST = 40
_NARROWEST = 4  # of the room for bars; with less there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How wide a line may be, and what bars and the line at zero are drawn with."""

    width: int
    bar: str
    zero: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One block or part, and its value."""

    name: str
    value: float
    is_part: bool

    @property
    def label(self) -> str:
        return f"  {self.name}" if self.is_part else self.name

    @property
    def number(self) -> str:
        return f"{self.value:g}"


def bars(plan: Plan, style: Style) -> Iterator[str]:
    """Draw the ratios that are more than a number, those that are alike once."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for step, parameter, ratio in _ratios(plan):
        picture = (line.rstrip() for line in _picture(ratio, plan.architecture, style))
        alike.setdefault((parameter, *picture), []).append(f"`{step}`")
    for lines, steps in alike.items():
        yield printable(f"{lines[0]} of {', '.join(steps)}:")
        yield from lines[1:]


def ratios_as_json(plan: Plan) -> list[dict[str, Any]]:
    """Turn the ratios that are more than a number into what a program can read: every block's value, and what names decide."""
    return [{"step": step, "parameter": parameter} | _table(ratio, plan.architecture) for step, parameter, ratio in _ratios(plan)]


def _table(ratio: Ratio, architecture: Architecture) -> dict[str, Any]:
    rows = list(_rows(ratio, architecture))
    return {
        "blocks": {row.name: row.value for row in rows if not row.is_part},
        "parts": {row.name: row.value for row in rows if row.is_part},
        "elemental": [entry for group in ratio.elemental for entry in group.entries()],
        "rules": [{"match": pattern, "value": value} for pattern, value in ratio.rules],
    }


def _ratios(plan: Plan) -> Iterator[tuple[str, str, Ratio]]:
    """Yield the ratios that are more than a number, by step and parameter; of a list, each by its place."""
    for name, step in plan.steps.items():
        for parameter, value in step.params.items():
            several = {f"{parameter}.{n}": item for n, item in enumerate(value, 1)} if isinstance(value, tuple) else {parameter: value}
            yield from ((name, key, item) for key, item in several.items() if isinstance(item, Ratio) and not item.is_number)


def _rows(ratio: Ratio, architecture: Architecture) -> Iterator[_Row]:
    """Yield every block, and behind it the parts of it that have another value."""
    parts: Mapping[str, list[str]] = {block: [] for block in architecture.blocks}
    for part, (block, _) in architecture.parts.items():
        if part in ratio.blocks:
            parts[block].append(part)
    for block in architecture.blocks or (BASE,):
        yield _Row(name=block, value=ratio.at(block), is_part=False)
        yield from (_Row(name=part, value=ratio.at(block, part), is_part=True) for part in parts.get(block, ()))


def _picture(ratio: Ratio, architecture: Architecture, style: Style) -> Iterator[str]:
    rows = list(_rows(ratio, architecture))
    if not ratio.blocks:
        yield f"{_INDENT}{'all blocks' if architecture.blocks else 'all tensors'}  {ratio.base:g}"
    else:
        yield from _drawn(rows, style)
    for group in ratio.elemental:
        yield from (f"{_INDENT}elemental  {printable(entry)}" for entry in group.entries())
    yield from (f"{_INDENT}rule  {printable(pattern)} = {value:g}" for pattern, value in ratio.rules)


def _drawn(rows: Sequence[_Row], style: Style) -> Iterator[str]:
    """Draw a line per row, all on one scale, on which 0 and 1 are always to be seen; what is below zero goes to the left of it."""
    low, high = min(0.0, *(row.value for row in rows)), max(1.0, *(row.value for row in rows))
    names, numbers = max(len(row.label) for row in rows), max(len(row.number) for row in rows)
    zero = style.zero if low < 0 else ""
    room = min(_WIDEST, style.width - len(_INDENT) - names - numbers - 4 - len(zero))
    left = min(max(1, round(room * Fraction(low) / (Fraction(low) - Fraction(high)))), room - 1) if zero else 0
    for row in rows:
        share = Fraction(row.value) / Fraction(low if row.value < 0 else high)
        bar = style.bar * max(bool(row.value), round(share * (left if row.value < 0 else room - left)))
        drawn = f"{bar.rjust(left)}{zero}" if row.value < 0 else f"{' ' * left}{zero}{bar}"
        yield f"{_INDENT}{row.label:{names}}  {row.number:>{numbers}}  {drawn if room >= _NARROWEST else ''}"
