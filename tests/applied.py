"""Applies methods to tensors of any shape, as the engine would: in slices, with measures joined over chunks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sdmerge_build.methods import REQUIRED, Method, Place
from sdmerge_build.methods.measures import Partials, answered, chunk_size, seen


def grain_of(method: Method, shape: Sequence[int]) -> int:
    """Count the elements that no slice of a tensor may divide."""
    numel = max(1, math.prod(shape))
    return {"anywhere": 1, "rows": shape[-1] if shape else 1, "filters": math.prod(shape[1:]) if shape else 1}.get(method.cut, numel) or 1


def evaluate(
    method: Method,
    models: Sequence[torch.Tensor],
    params: Mapping[str, Any],
    *,
    name: str = "layer.weight",
    findings: Any = None,
    slice_size: int = 0,
) -> torch.Tensor:
    """
    Apply a method to whole tensors of one shape; parameters left out have their defaults, and a number stands for a list of it.

    `slice_size` cuts the tensors as the engine may; measures are made of the engine's chunks either way.
    """
    shape = tuple(models[0].shape)
    flat = [model.contiguous().reshape(-1) for model in models]
    numel, grain = flat[0].numel(), grain_of(method, shape)
    filled = _filled(method, params, len(models) - len(method.models))

    def start(at: int, count: int) -> Any:
        extra = dict(filled)
        if method.place:
            extra[method.place] = Place(name=name, shape=shape, start=at, count=count, architecture="sd1")
        if method.findings:
            extra[method.findings] = findings
        return method.function(*(seen(model[at : at + count], method.cut, shape) for model in flat), **extra)

    known: list[tuple[Any, ...]] = []

    def answers(phase: int, _: Any) -> tuple[Any, ...]:
        if phase == len(known):
            size = chunk_size(method.cut, shape)
            known.append(_measured(lambda at: start(at, min(size, numel - at)), range(0, numel, size), known))
        return known[phase]

    size = numel if method.cut == "nowhere" else max(grain, slice_size // grain * grain) if slice_size else max(1, numel)
    pieces = []
    for at in range(0, max(1, numel), size):
        count, reach = min(size, numel - at), method.reach * grain
        low, high = max(0, at - reach), min(numel, at + count + reach)
        made = start(low, high - low)
        made = answered(made, answers) if inspect.isgenerator(made) else made
        pieces.append(made.reshape(-1)[at - low :][:count])
    return torch.cat(pieces).view(shape)


def _filled(method: Method, params: Mapping[str, Any], count: int) -> dict[str, Any]:
    filled = {}
    for parameter in method.parameters.values():
        value = params.get(parameter.name, parameter.default)
        assert value is not REQUIRED, f"`{parameter.name}` of `{method.name}` has no default"
        filled[parameter.name] = (value,) * count if parameter.is_list and not isinstance(value, tuple) else value
    return filled


def _measured(start: Any, chunks: range, known: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Measure every chunk, in as many rounds as it takes."""
    states: list[tuple[bool, Any]] = []
    while not states or not all(final for final, _ in states):
        asked = [_asked(start(at), known) for at in chunks]
        states = states or [(False, None)] * len(asked[0])
        for n, (final, state) in enumerate(states):
            if not final:
                partials = Partials(len(asked))
                for number, measures in enumerate(asked):
                    partials.add(measures[n], number, measures[n].partial(state))
                states[n] = partials.joined(asked[0][n], state)
    return tuple(state for _, state in states)


def _asked(made: Any, known: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    asked = next(made)
    for answers in known:
        asked = made.send(answers if isinstance(asked, tuple) else answers[0])
    return asked if isinstance(asked, tuple) else (asked,)
