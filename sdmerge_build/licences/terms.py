"""Owns what a licence text asks, as one value: a vector of components, and how two of them combine.

Has never heard of licences by name, of models or of files. Every component has an order from permissive to strict, so `meet` is
associative, commutative and idempotent, and the order of merging cannot change the answer.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["COMPONENTS", "EVERYWHERE", "HOSTS", "LADDERS", "PERMISSIVE", "UNKNOWN", "Cap", "Terms", "meet", "meet_all", "plain", "tightened"]

NOTHING: frozenset[str] = frozenset()
HOSTS = frozenset({"other-paid", "civitai", "own-free"})
EVERYWHERE = None
LADDERS: Mapping[str, tuple[str, ...]] = {
    "outputs_commercial": ("free", "no-competitor-training", "non-commercial"),
    "relicense": ("any", "respect-use-restrictions", "same-permissions", "same-licence", "no-sublicense"),
    "status": ("known", "claimed", "disputed", "unknown"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """Commercial use up to a yearly revenue in US$, which counts as allowed itself if `inclusive`, once registered with everybody named."""

    amount: int
    inclusive: bool = True
    registered: frozenset[str] = NOTHING

    def __str__(self) -> str:
        text = f"{'up to' if self.inclusive else 'below'} US${self.amount:,} a year"
        return f"{text}, registered" if self.registered else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a text asks of whoever shares a derivative; every default is the most permissive value.

    `weights_commercial` is "free", a `Cap` or "non-commercial"; `hosting` is who may run the model for others, of `HOSTS`;
    `copyleft` names families of texts that a derivative must stay under; `territory` is where rights are granted, `None` everywhere;
    all other sets hold what must be given, shown or obeyed, as identifiers or as short sentences.
    """

    use_restrictions: frozenset[str] = NOTHING
    weights_commercial: Cap | str = "free"
    outputs_commercial: str = "free"
    hosting: frozenset[str] = HOSTS
    sell_model: bool = True
    sell_merge: bool = True
    share_derivative: bool = True
    relicense: str = "any"
    copyleft: frozenset[str] = NOTHING
    credit: frozenset[str] = NOTHING
    notices: frozenset[str] = NOTHING
    license_copies: frozenset[str] = NOTHING
    branding: frozenset[str] = NOTHING
    change_notice: frozenset[str] = NOTHING
    source_offer: frozenset[str] = NOTHING
    filters: frozenset[str] = NOTHING
    territory: frozenset[str] | None = EVERYWHERE
    status: str = "known"

    def stricter(self) -> tuple[str, ...]:
        """Name the components that ask for something, in their fixed order."""
        return tuple(name for name in COMPONENTS if getattr(self, name) != getattr(PERMISSIVE, name))

    def plain(self) -> dict[str, str | bool | list[str]]:
        """Write down the components that ask for something, as TOML and JSON can hold them."""
        return {name: plain(getattr(self, name)) for name in self.stricter()}


COMPONENTS: tuple[str, ...] = tuple(Terms.__dataclass_fields__)
PERMISSIVE = Terms()
UNKNOWN = Terms(status="unknown")


def meet(a: Terms, b: Terms) -> Terms:
    """Combine two texts that both bind: in every component the stricter of both."""
    return Terms(**{name: _combine(name)(getattr(a, name), getattr(b, name)) for name in COMPONENTS})


def meet_all(terms: Iterable[Terms]) -> Terms:
    """Combine any number of texts; of none, everything is allowed."""
    return functools.reduce(meet, dict.fromkeys(terms), PERMISSIVE)


def tightened(base: Terms, other: Terms, components: Iterable[str]) -> tuple[str, ...]:
    """Name those of the components in which `other` asks for more than `base` does."""
    return tuple(name for name in components if _combine(name)(getattr(base, name), getattr(other, name)) != getattr(base, name))


def plain(value: Any) -> str | bool | list[str]:
    """Write down one component: a truth, a text, or a sorted list of texts in which `x:1..3` is `x:1` to `x:3`."""
    if isinstance(value, frozenset):
        return _runs(value)
    return value if isinstance(value, bool) else str(value)


def _runs(members: Iterable[str]) -> list[str]:
    """Sort members as people count; numbered ones without a gap between them are one: `railA:1..11`."""
    numbered: dict[str, set[int]] = {}
    written: list[tuple[str, int, str]] = []
    for member in members:
        head, colon, number = member.rpartition(":")
        if colon and re.fullmatch("[1-9][0-9]{0,8}", number):
            numbered.setdefault(head, set()).add(int(number))
        else:
            written.append((member, 0, member))
    for head, numbers in numbered.items():
        for first in sorted(n for n in numbers if n - 1 not in numbers):
            last = next(n for n in itertools.count(first) if n + 1 not in numbers)
            written.append((f"{head}:", first, f"{head}:{first}" + (f"..{last}" if last > first else "")))
    return [text for _, _, text in sorted(written)]


@functools.cache
def _combine(name: str) -> Callable[[Any, Any], Any]:
    if name in LADDERS:
        return lambda a, b: max(a, b, key=LADDERS[name].index)
    if name == "weights_commercial":
        return _stricter_use
    if name == "territory":
        return lambda a, b: b if a is EVERYWHERE else a if b is EVERYWHERE else a & b
    if name in {"hosting", "sell_model", "sell_merge", "share_derivative"}:
        return lambda a, b: a & b
    return lambda a, b: a | b


def _stricter_use(a: Cap | str, b: Cap | str) -> Cap | str:
    if isinstance(a, Cap) and isinstance(b, Cap):
        amount, inclusive = min((a.amount, a.inclusive), (b.amount, b.inclusive))
        return Cap(amount=amount, inclusive=inclusive, registered=a.registered | b.registered)
    if "non-commercial" in {a, b}:
        return "non-commercial"
    return b if a == "free" else a
