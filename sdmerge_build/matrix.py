"""Owns `matrix`: one step table with axes becomes one table per combination of their values.

Has never heard of what the fields mean; it only fills in `{axis}`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sdmerge_build.errors import Issue, nearest
from sdmerge_build.tomltext import Lines

__all__ = ["expand_matrix"]

MAX_STEPS = 10_000
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def expand_matrix(name: str, table: Mapping[str, Any], lines: Lines, issues: list[Issue]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(name, table)` for every combination of the axes; a table without `matrix` is yielded as it is.

    A field that is nothing but `{axis}` becomes the value itself; inside longer text the value is written out.
    """
    where = lines.where("step", name)
    axes = table.get("matrix")
    if axes is None:
        yield name, dict(table)
        return
    if complaint := _bad_axes(axes):
        issues.append(Issue(where=lines.where("step", name, "matrix"), what=f"step `{name}`: {complaint}"))
        return
    if unused := [axis for axis in axes if f"{{{axis}}}" not in name]:
        what = f"the name of step `{name}` does not hold `{{{unused[0]}}}`, so its steps would share one name"
        issues.append(Issue(where=where, what=what, hint=f'write [step."{name}-{{{unused[0]}}}"]'))
        return
    fields = {key: value for key, value in table.items() if key != "matrix"}
    if unknown := sorted({word for word in _placeholders([name, fields]) if word not in axes}):
        what = f"step `{name}` holds `{{{unknown[0]}}}`, which is not an axis of its matrix"
        issues.append(Issue(where=where, what=what, hint=nearest(unknown[0], axes)))
        return
    varying = {key: value for key, value in fields.items() if any(_placeholders(value))}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        yield str(_fill(name, chosen, whole=False)), fields | _fill(varying, chosen)


def _bad_axes(axes: Any) -> str:
    if not isinstance(axes, Mapping) or not axes:
        return "`matrix` must be a table of lists, such as `{ ratio = [0.6, 0.7] }`"
    count = 1
    for axis, values in axes.items():
        if not isinstance(values, list) or not values or not all(type(v) in {int, float, str} for v in values):
            return f"axis `{axis}` must be a list of numbers or texts"
        count *= len(values)
    return f"`matrix` makes {count} steps; at most {MAX_STEPS} are built" if count > MAX_STEPS else ""


def _placeholders(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from _PLACEHOLDER.findall(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _placeholders([key, item])
    elif isinstance(value, list):
        for item in value:
            yield from _placeholders(item)


def _fill(value: Any, chosen: Mapping[str, Any], *, whole: bool = True) -> Any:
    if isinstance(value, str):
        if whole and (match := _PLACEHOLDER.fullmatch(value)):
            return chosen[match[1]]
        return _PLACEHOLDER.sub(lambda match: str(chosen[match[1]]), value)
    if isinstance(value, Mapping):
        return {_fill(key, chosen, whole=False): _fill(item, chosen) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, chosen) for item in value]
    return value
