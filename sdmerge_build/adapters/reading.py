"""Owns the reading of adapters: which stored tensors are the factors of which change.

Has never heard of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from sdmerge_build.adapters.changes import TAKEN, Adapter, Change
from sdmerge_build.adapters.products import UnfitError, by, products
from sdmerge_build.adapters.spellings import BIAS, PREFIXES, WEIGHT, Spot, names_table, spellings_of
from sdmerge_build.architectures import ARCHITECTURES, GENERIC, Architecture, architecture_named
from sdmerge_build.dtypes import MERGEABLE, WHOLE
from sdmerge_build.tensorfile import Spec

__all__ = ["is_adapter", "read_adapter", "recognise_adapter"]

MAX_MADE = 1 << 28  # elements; four times the largest layer of Flux
MAX_RANK = 1 << 15  # ten times the width of Flux

_ANY, _BIAS = "*", "bias"  # kinds in the table of suffixes: roles of every kind, and what a module does to its bias

_CORES = ("mid", "t1", "t2")
_WHOLE_NUMBERS = {"alpha", "on_input"}  # roles that may have them
_COMMON = {"weight", "alpha", "rescale", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "up.weight", "down.weight"}
"""Endings that tensors of models have too."""


@dataclass(slots=True)
class _Module:
    """The tensors of a file that belong together: kind and role → name."""

    name: str
    factors: dict[tuple[str, str], str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)  # names of tensors whose roles are taken

    @property
    def tensors(self) -> list[str]:
        """List all of them."""
        return [*self.factors.values(), *self.twice]

    def of(self, kind: str) -> dict[str, str]:
        """Return the factors of a kind by role, with those that any kind may have."""
        return {role: name for (k, role), name in self.factors.items() if k in {kind, _ANY}}


def is_adapter(names: Collection[str]) -> bool:
    """Tell from its names whether a file is an adapter."""
    return any(_is_of_adapter(name) for name in names)


def _is_of_adapter(name: str) -> bool:
    if name.startswith(PREFIXES):
        return True
    module, ending = _divided(name)
    return bool(ending) and (ending not in _COMMON or "_lora" in module.rpartition(".")[2])


def _divided(name: str) -> tuple[str, str]:
    """Divide a name into its module and the longest ending that is known."""
    suffixes = names_table()["suffixes"]
    words = name.rsplit(".", 3)
    for n in range(1, len(words)):
        if (ending := ".".join(words[n:])) in suffixes:
            return ".".join(words[:n]), ending
    return name, ""


def recognise_adapter(tensors: Mapping[str, Spec]) -> tuple[Architecture, Adapter] | None:
    """Tell for which architecture an adapter is made: the one by whose names most of it is understood; None where nobody understands any."""
    readings = [(family, read_adapter(tensors, family)) for name in ARCHITECTURES if name != GENERIC for family in [architecture_named(name)]]
    best = min(readings, key=lambda reading: len(reading[1].strays) + len(reading[1].incomplete))
    return best if best[1].changes else None


def read_adapter(tensors: Mapping[str, Spec], architecture: Architecture) -> Adapter:
    """Read what an adapter does to the tensors of an architecture."""
    reading = _Reading(tensors, architecture)
    modules: dict[str, _Module] = {}
    for name in sorted(tensors):
        module, ending = _divided(name)
        if not ending:
            reading.strays.append(name)
            continue
        kind, role = names_table()["suffixes"][ending].split()
        held = modules.setdefault(module, _Module(module))
        if held.factors.setdefault((kind, role), name) != name:
            held.twice.append(name)
    for held in modules.values():
        reading.read(held)
    changes = {
        target: tuple(sorted((change for change, _ in reading.held[target]), key=lambda change: change.rows or (0, 0)))
        for target in sorted(reading.held)
    }
    contested = [text for target, said in reading.held.items() for text in _contested(target, said)]
    return Adapter(changes=changes, strays=tuple(sorted(reading.strays)), incomplete=(*reading.incomplete, *contested))


def _contested(target: str, said: Sequence[tuple[Change, str]]) -> Iterator[str]:
    """Complain of modules that change the same rows of a tensor."""
    ordered = sorted(said, key=lambda one: (one[0].rows or (0, 0), one[1]))
    is_parted = all(change.rows for change, _ in said)
    for (change, module), (other, another) in pairwise(ordered):
        if module != another and (not is_parted or (change.rows and other.rows and sum(change.rows) > other.rows[0])):
            yield f"`{module}` and `{another}` both change `{target}`"


class _Reading:
    """What is known of an adapter while it is read."""

    def __init__(self, tensors: Mapping[str, Spec], architecture: Architecture) -> None:
        self._tensors, self._architecture, self._spellings = tensors, architecture, spellings_of(architecture)
        self.strays: list[str] = []
        self.incomplete: list[str] = []
        self.held: dict[str, list[tuple[Change, str]]] = {}

    def read(self, module: _Module) -> None:
        """Take a module's tensors for factors of changes, for strays, or complain."""
        weights, biases = (self._spellings.find(module.name, parameter) for parameter in (WEIGHT, BIAS))
        if not weights and not biases:
            self.strays += module.tensors
            return
        for name in module.twice:
            self._complain(module, f"has a tensor twice: `{name}` is the second")
        bias = module.factors.pop((_BIAS, "diff"), "")
        if bias and not biases:
            self.strays.append(bias)
        elif bias.endswith((".lora_B.bias", ".lora_B.default.bias")) and (_ANY, "alpha") in module.factors:
            self._complain(module, "has `lora_B.bias` and `alpha`, of which nobody knows whether it scales that")
        elif bias:
            self._hold(module, "diff", {"diff": bias}, biases)
        if ("ia3", "on_input") not in module.factors and (plain := module.factors.pop(("ia3", "weight"), "")):
            self.strays.append(plain)
        if module.factors and not weights:
            self.strays += module.factors.values()
        elif module.factors and (kind := self._kind(module)):
            self._hold(module, kind, module.of(kind), weights)

    def _kind(self, module: _Module) -> str:
        """Return the kind of a module that has all it needs and nothing else, or complain."""
        kinds = sorted({kind for kind, _ in module.factors} - {_ANY})
        if len(kinds) != 1:
            listed = " and ".join(f"`{name}`" for name in (kinds or [role for _, role in sorted(module.factors)]))
            self._complain(module, f"is of several kinds: {listed}" if kinds else f"has {listed} and nothing else")
            return ""
        [kind] = kinds
        if text := _incomplete(kind, module.of(kind).keys()):
            self._complain(module, text)
            return ""
        return kind

    def _hold(self, module: _Module, kind: str, factors: Mapping[str, str], spots: Sequence[Spot | None]) -> None:
        """Make a module's factors a change, or the changes of two halves, or complain."""
        kind = "boft" if kind == "oft" and len(self._tensors[factors["blocks"]].shape) == 4 else kind
        try:
            spot = self._one(spots)
            rows = self._rows(kind, factors)
            for change in _changes(kind, factors, spot, rows):
                self.held.setdefault(change.target, []).append((change, module.name))
        except UnfitError as error:
            self._complain(module, str(error))

    def _one(self, spots: Sequence[Spot | None]) -> Spot:
        """Return the one spot that a name stands for."""
        if None in spots:
            hint = f'say which the models are, as in `architecture = "{self._architecture.name}/VARIANT"`'
            raise UnfitError(f"is not the same in all variants of {self._architecture.title}: {hint}")
        if len(spots) > 1:
            raise UnfitError(f"may be any of {' and '.join(f'`{spot.target}`' for spot in spots if spot)}")
        [spot] = spots
        assert spot, "BUG: there is one"
        return spot

    def _rows(self, kind: str, factors: Mapping[str, str]) -> int:
        """Return how many rows factors make, when there is nothing wrong with them."""
        for role, name in factors.items():
            dtype, shape = self._tensors[name].dtype, self._tensors[name].shape
            if dtype not in (MERGEABLE | WHOLE if role in _WHOLE_NUMBERS else MERGEABLE):
                raise UnfitError(f"has `{role}` as {dtype}, which is not computed with")
            if role == "dora_scale" and "lora_magnitude_vector" in name and len(shape) > 2:
                raise UnfitError("has `lora_magnitude_vector` of a convolution, which is not read")
        shapes = {role: self._tensors[name].shape for role, name in factors.items()}
        made = products(kind, shapes)[0]
        if math.prod(made.shape) > MAX_MADE or max((0, *(n for role in _CORES for n in shapes.get(role, ())[:2]))) > MAX_RANK:
            raise UnfitError(f"makes {by(made.shape)}, of a larger rank or more elements than any layer has")
        return made.rows

    def _complain(self, module: _Module, text: str) -> None:
        self.incomplete.append(f"`{module.name}` {text}")


def _incomplete(kind: str, roles: Collection[str]) -> str:
    """Say what a module of a kind lacks, or has although it means nothing; nothing when it is as it should be."""
    table = names_table()["kinds"][kind]
    known: set[str] = set()
    for need in table["needs"]:
        choices = [choice.split() for choice in need.split("|")]
        begun = [choice for choice in choices if any(role in roles for role in choice)]
        if len(begun) > 1:
            return f"has both {' and '.join(_listed(kind, choice) for choice in choices)}"
        if lacking := [role for role in (begun or choices)[0] if role not in roles]:
            return f"has {_listed(kind, roles)} and lacks {_listed(kind, lacking)}"
        known.update(begun[0])
    for may in table["may"]:
        together = may.split()
        if lacking := [role for role in together if role not in roles]:
            if len(lacking) < len(together):
                return f"has {_listed(kind, roles)} and lacks {_listed(kind, lacking)}"
            continue
        known.update(together)
    return f"has {_listed(kind, unknown)}, which means nothing beside {_listed(kind, known)}" if (unknown := set(roles) - known) else ""


def _listed(kind: str, roles: Collection[str]) -> str:
    """Name roles as the endings of names that they usually are."""
    suffixes = names_table()["suffixes"]
    endings = {role: next(s for s, said in suffixes.items() if said in {f"{kind} {role}", f"{_ANY} {role}"}) for role in sorted(roles)}
    return ", ".join(f"`{ending}`" for ending in endings.values())


def _changes(kind: str, factors: Mapping[str, str], spot: Spot, rows: int) -> list[Change]:
    """Return what factors that make so many rows do to the tensor they are for. Raises `UnfitError`."""
    if spot.is_swapped:
        if not factors.keys() <= TAKEN | {"down", "mid", "alpha"} or kind == "ia3":
            raise UnfitError(f"is `{kind}` of what diffusers keeps in another order than checkpoints: only lora, diff and set come apart there")
        if rows % 2:
            raise UnfitError(f"makes {rows} rows, which have no halves")
        first, second = (0, rows // 2), (rows // 2, rows // 2)
        return [Change(target=spot.target, kind=kind, factors=factors, rows=there, taken=here) for there, here in ((first, second), (second, first))]
    if spot.part is None:
        return [Change(target=spot.target, kind=kind, factors=factors, turned=spot.is_turned)]
    start, count, of = spot.part
    if kind == "ia3" and count > 1:
        raise UnfitError("is `ia3` of a part that need not be square, so its rows are not known")
    if rows % count:
        raise UnfitError(f"makes {rows} rows, which cannot be {count} of {of} equal parts")
    return [Change(target=spot.target, kind=kind, factors=factors, rows=(start * rows // count, rows), turned=spot.is_turned)]
