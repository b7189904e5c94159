"""Owns the shares that a step's inputs have in each of its tensors, and with them which models need be read at all.

Has never heard of what tensors hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sdmerge_build.blend import Blend, blend_of
from sdmerge_build.plan import Plan, Step
from sdmerge_build.weights.ratio import Ratio

__all__ = ["Shares"]


class Shares:
    """Shares by the values that parameters have for a tensor; each is found once."""

    def __init__(self, plan: Plan, step: Step, models: Collection[int]) -> None:
        self._plan, self._step, self._models = plan, step, tuple(models)
        self._known: dict[tuple[Any, ...], tuple[Blend | None, tuple[int, ...]]] = {}

    def params(self, tensor: str) -> dict[str, Any]:
        """Resolve every parameter for one tensor: ratios become numbers."""
        return {key: self._resolved(value, tensor) for key, value in self._step.params.items()}

    def of(self, params: Mapping[str, Any]) -> tuple[Blend | None, tuple[int, ...]]:
        """Return each input's share, None where the method is not linear, and which models need be read.

        Those that the method can do without, and takes nothing of, need not; nor do adapters, whose shares say how strongly they are applied.
        """
        key = tuple(params.values())
        if key not in self._known:
            self._known[key] = self._found(params)
        return self._known[key]

    def odd_totals(self) -> Iterator[float]:
        """Yield what the shares of models sum to, where it is not 1."""
        totals = {round(sum(blend[n] for n in self._models), 6) for blend, _ in self._known.values() if blend}
        yield from sorted(totals - {1.0})

    def _found(self, params: Mapping[str, Any]) -> tuple[Blend | None, tuple[int, ...]]:
        method, count = self._step.method, len(self._step.inputs)
        blend = blend_of(method, range(count), count, params)
        if blend is None:
            return None, self._models
        some = tuple(n for n in self._models if blend[n] != 0)
        is_copy = len(some) == 1 and blend[some[0]] == 1
        if not some or is_copy or blend_of(method, some, count, params):
            return blend, some
        return blend, self._models

    def _resolved(self, value: Any, tensor: str) -> Any:
        if isinstance(value, Ratio):
            return value.of(tensor, self._plan.architecture)
        if isinstance(value, tuple):
            return tuple(self._resolved(item, tensor) for item in value)
        return value
