"""Owns the table of what adapters do in a plan: which parts of a model each changes, of what rank, and how strongly.

Has never heard of arithmetic; all but alphas is seen in headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdmerge_build.check import Checked, Strength
from sdmerge_build.plan import Plan

__all__ = ["Use", "uses_of"]

Alpha = Callable[[str, str], float | None]
"""Reads a number that an adapter stores: the adapter's name, the tensor's."""

Span = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one adapter does in one step."""

    step: str
    adapter: str
    kinds: tuple[str, ...]
    tensors: Mapping[str, int]  # component → how many of its tensors are changed
    ranks: Span | None  # least and most; None where nothing has a rank, or none is known yet
    alphas: Span | None  # None where the adapter says none, or its file is not here
    strengths: Span

    def table(self) -> dict[str, Any]:
        """Write it for programs."""
        return {
            "step": self.step,
            "adapter": self.adapter,
            "kinds": list(self.kinds),
            "tensors": dict(self.tensors),
            "ranks": self.ranks and list(self.ranks),
            "alphas": self.alphas and list(self.alphas),
            "strengths": list(self.strengths),
        }


def uses_of(plan: Plan, checked: Checked, alpha: Alpha) -> Iterator[Use]:
    """Yield what every adapter does in every step that applies it, in the order of steps."""
    for step in plan.steps:
        applied: dict[str, list[tuple[str, Strength]]] = {}
        for tensor, operation in checked.operations.get(step, {}).items():
            for strength in operation.changes:
                applied.setdefault(strength.adapter, []).append((tensor, strength))
        for adapter, said in applied.items():
            yield _use(plan, checked, step, adapter, said, alpha)


def _use(plan: Plan, checked: Checked, step: str, adapter: str, said: Sequence[tuple[str, Strength]], alpha: Alpha) -> Use:
    stored = checked.factors.get(adapter, {})
    changes = [strength.change for _, strength in said]
    down = [change.factors["down"] for change in changes if "down" in change.factors]
    alphas = dict.fromkeys(change.factors["alpha"] for change in changes if "alpha" in change.factors)
    components = Counter(plan.architecture.component_of(tensor) for tensor in dict.fromkeys(tensor for tensor, _ in said))
    return Use(
        step=step,
        adapter=adapter,
        kinds=tuple(dict.fromkeys(f"{change.kind}{' with dora' if 'dora_scale' in change.factors else ''}" for change in changes)),
        tensors=dict(sorted(components.items())),
        ranks=_span(stored[name].shape[0] for name in down if name in stored and stored[name].shape),
        alphas=_span(value for name in alphas if (value := alpha(adapter, name)) is not None),
        strengths=_span(strength.strength for _, strength in said) or (0.0, 0.0),
    )


def _span(values: Iterator[float]) -> Span | None:
    found = list(values)
    return (min(found), max(found)) if found else None
