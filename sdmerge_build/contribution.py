"""Owns who contributes: the sources that any ratio lets into an artifact, found from the recipe alone.

Has never heard of headers or licences; what the files hold changes nothing here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from sdmerge_build.blend import blend_of
from sdmerge_build.plan import Plan, Step
from sdmerge_build.weights.ratio import Ratio

__all__ = ["contributors"]

MOST_POINTS = 256  # combinations of ratios that are tried; beyond, an input counts as contributing


def contributors(plan: Plan, step: Step) -> set[str]:
    """Find the sources that any ratio lets into an artifact; by the recipe alone, whatever the files hold."""
    found: set[str] = set()
    stack, seen = [step.name], {step.name}
    while stack:
        name = stack.pop()
        if name in plan.sources:
            found.add(name)
            continue
        inputs = set(_contributing(plan, plan.steps[name]))
        stack += inputs - seen
        seen |= inputs
    return found


def _contributing(plan: Plan, step: Step) -> Iterator[str]:
    """Yield the inputs of a step that may leave anything in its result.

    One that is scaled to nothing everywhere does not, unless it is the first, whose whole numbers and constants are copied, or what
    only it holds may be kept: by a policy, or because the architecture calls it optional. Adapters hold nothing that could be.
    """
    points = _points(plan, step)
    is_kept = {"keep", "overlap"} & {step.missing, step.extra, step.mismatch} or (step.extra != "drop" and plan.architecture.optional)
    if points is None or (is_kept and not step.adapters):
        yield from step.inputs
        return
    count = len(step.inputs)
    blends = [blend_of(step.method, range(count), count, params) for params in points]
    for n, name in enumerate(step.inputs):
        if n == 0 or (is_kept and name not in step.adapters) or any(blend is None or blend[n] != 0 for blend in blends):
            yield name


def _points(plan: Plan, step: Step) -> list[dict[str, Any]] | None:
    """List every combination of ratios that a tensor may meet: aligned by block, and where names decide, any value with any other."""
    ratios = [r for value in step.params.values() for r in (value if isinstance(value, tuple) else (value,)) if isinstance(r, Ratio)]
    blocks = [*plan.architecture.blocks, *plan.architecture.parts]
    if any(ratio.reads_names for ratio in ratios):
        choices = [sorted(ratio.values()) for ratio in ratios]
        if math.prod(map(len, choices)) > MOST_POINTS:
            return None
        rows = list(itertools.product(*choices))
    else:
        rows = [tuple(_of_block(ratio, block, plan) for ratio in ratios) for block in blocks or [""]]
    return [_filled(step.params, iter(row)) for row in dict.fromkeys(rows)]


def _of_block(ratio: Ratio, block: str, plan: Plan) -> float:
    owner = plan.architecture.parts[block][0] if block in plan.architecture.parts else block
    return ratio.at(owner, block)


def _filled(params: Mapping[str, Any], values: Iterator[float]) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(fill(item) for item in value)
        return next(values) if isinstance(value, Ratio) else value

    return {name: fill(value) for name, value in params.items()}
