"""Owns profiles: the value of every block, said as one number, as block weights, by a preset's name, or as a curve over depth.

Has never heard of tensors, nor of what blocks, elemental text and rules make of it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from sdmerge_build.architectures import BASE, Architecture, architecture_names
from sdmerge_build.errors import nearest
from sdmerge_build.weights.number import Range, RatioError
from sdmerge_build.weights.presets import ALIASES, POSITIONS, PRESETS, Preset

__all__ = ["PROFILES", "read_profile"]

PROFILES = ("mbw", "preset", "curve")
_MOST_KNOTS = 100
_CURVE = "write `curve = [0.2, 0.8, 0.5]`, from the first layer to the last"


def read_profile(table: Mapping[str, Any], architecture: Architecture, numbers: Range) -> dict[str, float]:
    """Read the value of BASE, and of every block and part whose value is another. Raises `RatioError`."""
    said = [field for field in PROFILES if field in table]
    if len(said) > 1:
        raise RatioError(f"has both `{said[0]}` and `{said[1]}`, each of which says the value of every block", "leave one of them out")
    base = numbers.read(table["base"], "`base`") if "base" in table else None
    if said:
        _refuse_where_unknown(said[0], architecture)
    match said:
        case ["mbw"]:
            return _read_mbw(table["mbw"], base, architecture, numbers)
        case ["preset"]:
            return _read_preset(table["preset"], base, architecture, numbers)
    if base is None:
        what, beside = ("is no layer", " beside `curve`") if said else ("no block or rule names", "")
        raise RatioError(f"lacks `base`, the value of everything that {what}", f"write `base = 0.5`{beside}")
    return {BASE: base} | (_read_curve(table["curve"], architecture.depth, numbers) if said else {})


def _refuse_where_unknown(field: str, architecture: Architecture) -> None:
    """Refuse block weights where there are no blocks, and curves where nobody knows how many layers there are."""
    if not architecture.blocks:
        raise RatioError(f"has `{field}`, but {architecture.title} has no blocks", "use `rules` with globs over tensor names")
    if field == "mbw" and not architecture.lists:
        raise RatioError(f"has `mbw`, but nobody pastes block weights for {architecture.title}", "use `blocks`, `preset` or `curve`")
    if field != "mbw" and not architecture.depth:
        variants = [name for name in architecture_names() if name.startswith(f"{architecture.name}/")]
        message = f"has `{field}`, but {architecture.title} comes with more and with fewer layers"
        raise RatioError(message, f"say which it is: `architecture` is one of {', '.join(variants)}")


def _read_mbw(said: Any, base: float | None, architecture: Architecture, numbers: Range) -> dict[str, float]:
    """Read block weights as people paste them: the architecture's list of as many names, without BASE when `base` says it."""
    if isinstance(said, list):
        values = [numbers.read(item, f"value {n} of `mbw`") for n, item in enumerate(said, 1)]
    elif isinstance(said, str):
        values = [_read_weight(n, item, numbers) for n, item in enumerate(said.split(","), 1)]
    else:
        raise RatioError("has an `mbw` that is neither text nor a list", 'write `mbw = "0.5,0,…"`')
    lists = list(architecture.lists.values())
    if base is not None and any(len(values) == len(names) and BASE in names for names in lists):
        message = f"has both `base` and an `mbw` of {len(values)} values, the first of which is BASE"
        raise RatioError(message, "leave one of them out")
    fitting = lists if base is None else [names for entry in lists for names in _without_base(entry)]
    names = next((names for names in fitting if len(names) == len(values)), None)
    if names is None:
        raise _no_list_fits(len(values), fitting, architecture, is_with=base is None)
    if base is None and BASE not in names:
        raise RatioError(f"lacks `base`, the value of what none of the {len(names)} values of `mbw` is for", "write `base = 0` beside `mbw`")
    return ({} if base is None else {BASE: base}) | {name: value for name, value in zip(names, values, strict=True) if name}


def _read_weight(n: int, text: str, numbers: Range) -> float:
    name = text.strip()
    is_preset = name in PRESETS or name in ALIASES
    return numbers.parse(text, f"value {n} of `mbw`", f'write `preset = "{name}"`' if is_preset else "leave out what is no number")


def _without_base(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield what is left of a list when `base` stands beside it: all but BASE, or where it has no BASE, all, or all but the first, which is base."""
    if BASE not in names:
        yield names
        yield names[1:]
    else:
        yield tuple(name for name in names if name != BASE)


def _no_list_fits(count: int, fitting: Sequence[Sequence[str]], architecture: Architecture, *, is_with: bool) -> RatioError:
    """Say how many values there may be, in which order, and what is amiss when one is missing."""
    wanted = sorted({len(names) for names in fitting})
    what = f"has an `mbw` of {count} values; {architecture.title} takes {_either(wanted)} {'with' if is_with else 'without'} BASE"
    without = "; to leave BASE out, write `base` beside `mbw`" if is_with and count + 1 in wanted else ""
    return RatioError(what, f"the order is {', '.join(fitting[0][:3])}, …, {fitting[0][-1]}{without}")


def _either(counts: Sequence[int]) -> str:
    *others, last = map(str, counts)
    return f"{', '.join(others)} or {last}" if others else last


def _read_preset(said: Any, base: float | None, architecture: Architecture, numbers: Range) -> dict[str, float]:
    """Read a preset's name, or `{ from, to, at }`, a mixture of two."""
    if isinstance(said, str):
        mixture = [(_preset(said, architecture), Fraction(1))]
    elif isinstance(said, Mapping) and said.keys() == {"from", "to", "at"}:
        at = Fraction(Range(0, 1).read(said["at"], "`at` of `preset`"))
        mixture = [(_preset(said["from"], architecture), 1 - at), (_preset(said["to"], architecture), at)]
    else:
        raise RatioError("has a `preset` that is neither a name nor `{ from = NAME, to = NAME, at = NUMBER }`", 'write `preset = "GRAD_V"`')
    values = {BASE: sum(preset.base * share for preset, share in mixture)}
    for preset, share in mixture:
        for block, value in _laid_out(preset, architecture).items():
            values[block] = values.get(block, Fraction(0)) + value * share
    rounded = {block: numbers.read(float(value), f"the preset's value of {block}") for block, value in values.items()}
    return rounded if base is None else rounded | {BASE: base}


def _preset(name: Any, architecture: Architecture) -> Preset:
    """Find a preset by sd-meh's or supermerger's name."""
    known = [*PRESETS, *ALIASES]
    if not isinstance(name, str) or name not in known:
        shown = f"`{name[:40]}`" if isinstance(name, str) else repr(name)[:40]
        is_random = name in {"ALL_R", "ALL_U", "ALL_X"}
        advice = "results must not differ from run to run; write the numbers" if is_random else nearest(str(name), known)
        raise RatioError(f"has the preset {shown}, which there is not", advice or f"`sdbuild methods --blocks {architecture.name}` lists presets")
    return PRESETS[ALIASES.get(name, name)]


def _laid_out(preset: Preset, architecture: Architecture) -> dict[str, Fraction]:
    """Lay a preset over an architecture's layers.

    Curves are sampled, so they keep their shape whatever the depth. Lists of positions go where block weights for SD 1 go when they
    are pasted here, as supermerger folds them for SDXL; where nobody folds them, each layer takes the position that is nearest.
    """
    depth = architecture.depth
    folded = [names for names in architecture.lists.values() if len(names) == 1 + POSITIONS and names[0] == BASE]
    if preset.positions and len(depth) != POSITIONS and folded:
        return {name: value for name, value in zip(folded[0][1:], preset.positions, strict=True) if name}
    return {block: preset.at(n, len(depth)) for n, block in enumerate(depth)}


def _read_curve(said: Any, depth: Sequence[str], numbers: Range) -> dict[str, float]:
    """Read values that stand at equal distances from the first layer to the last, with straight lines between them."""
    if not isinstance(said, list) or not 1 <= len(said) <= _MOST_KNOTS:
        raise RatioError(f"has a `curve` that is not a list of 1 to {_MOST_KNOTS} numbers", _CURVE)
    knots = [Fraction(numbers.read(item, f"value {n} of `curve`")) for n, item in enumerate(said, 1)]
    values = {}
    for n, block in enumerate(depth):
        position = Fraction(n * (len(knots) - 1), max(len(depth) - 1, 1))
        left = int(position)
        right = min(left + 1, len(knots) - 1)
        values[block] = float(knots[left] + (knots[right] - knots[left]) * (position - left))
    return values
