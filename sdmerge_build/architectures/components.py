"""Owns files that hold parts of a checkpoint: which components of an architecture these are, and which tensor is which of a checkpoint.

Has never heard of recipes. Such a file is a VAE or a text encoder as it is published by itself, in original naming behind any prefix or none,
or as diffusers and transformers name it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sdmerge_build.architectures import ARCHITECTURES, Architecture, architecture_named, diffusers_names
from sdmerge_build.architectures.made import Made

__all__ = ["Components", "read_components", "recognise_components", "roots_of"]

_MODULES = ("transformer", "model")  # what a text encoder's own names begin below
_EXCUSED = ("*position_ids", "*logit_scale", "*text_projection", "*text_projection.weight")  # what files of text encoders have or have not
_LEFT_OUT = (*_EXCUSED, "loss.*", "model_ema.*", "global_step", "*vision_model.*", "visual_projection.*", "spiece_model")
_OF_T5 = ("decoder.*", "lm_head.*", "shared.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What a file holds that is less than a checkpoint."""

    names: tuple[str, ...]  # of the components
    naming: str  # `original` or `diffusers`
    tensors: Mapping[str, Made]  # as a checkpoint calls it → what the file calls it
    strays: tuple[str, ...]  # names that nothing is known of
    left_out: tuple[str, ...]  # names of what a checkpoint has no place for
    lacking: tuple[str, ...]  # what a checkpoint has in these components, and the file has not

    @property
    def is_whole(self) -> bool:
        """Tell whether nothing is missing and nothing is unknown."""
        return not self.strays and not self.lacking


@dataclass(frozen=True, slots=True, kw_only=True)
class _Naming:
    """What a file might call the tensors of some components."""

    kind: str
    places: Mapping[str, tuple[str, int]]  # its name → that in a checkpoint, and which of the tensors that this one is made of
    made: Mapping[str, tuple[str, tuple[int, ...]]]  # name in a checkpoint → how it is made, and of what sizes, where of several


def read_components(names: Collection[str], architecture: Architecture) -> Components | None:
    """Read a file's names as those of components of an architecture; None when it holds nothing of the kind."""
    read = [
        components
        for prefix in _prefixes(names)
        for naming in _namings(_full_name(architecture))
        if (components := _read(names, prefix, naming, architecture))
    ]
    return max(read, key=lambda c: (c.is_whole, len(c.tensors) - len(c.strays), -len(c.lacking)), default=None)


def recognise_components(names: Collection[str]) -> list[tuple[Architecture, Components]]:
    """List the architectures of which a file with these names is a whole component; alike in several are the VAEs of SD 1 and SDXL."""
    families = [architecture_named(name) for name in ARCHITECTURES]
    return [(family, found) for family in families if (found := read_components(names, family)) and found.is_whole]


def roots_of(component: str, architecture: Architecture) -> list[str]:
    """List what names of a component may begin with in a checkpoint, longest first: a file of this component alone leaves it out."""
    layout = architecture.layout()
    prefixes = [prefix for prefix in architecture.components.get(component, ()) if prefix.endswith(".") and any(n.startswith(prefix) for n in layout)]
    deeper = [f"{prefix}{module}." for prefix in prefixes for module in _MODULES if any(n.startswith(f"{prefix}{module}.") for n in layout)]
    return sorted({*prefixes, *deeper}, key=len, reverse=True)


def _prefixes(names: Collection[str]) -> list[str]:
    """List what most names of a file begin with, as far as a few words; nothing is one of them."""
    counted: Counter[str] = Counter()
    for name in names:
        words = name.split(".")
        counted.update(".".join(words[:n]) + "." for n in range(1, min(4, len(words))))
    return ["", *(prefix for prefix, count in counted.items() if 2 * count > len(names))]


def _read(names: Collection[str], prefix: str, naming: _Naming, architecture: Architecture) -> Components | None:
    """Read names in one way, if most of them can be, and most of what the component consists of is there."""
    held: dict[str, dict[int, str]] = {}
    unread = []
    for name in sorted(names):
        original, n = naming.places.get(name.removeprefix(prefix), ("", 0)) if name.startswith(prefix) else ("", 0)
        if not original or n in held.get(original, ()):
            unread.append(name)
        else:
            held.setdefault(original, {})[n] = name
    tensors = {}
    for original, pieces in held.items():
        how, sizes = naming.made[original]
        if len(pieces) == max(1, len(sizes)):
            tensors[original] = Made(tuple(pieces[n] for n in sorted(pieces)), how, sizes=sizes)
        else:
            unread += pieces.values()
    components = tuple(dict.fromkeys(architecture.component_of(name) for name in tensors))
    needed = [name for name in architecture.layout() if architecture.component_of(name) in components]
    if not tensors or 2 * len(tensors) < len(needed):
        return None
    dropped = _LEFT_OUT + (_OF_T5 if "t5" in components and "vae" not in components else ())
    left_out = tuple(name for name in unread if _matches(name.removeprefix(prefix), dropped))
    strays = tuple(name for name in unread if name not in set(left_out))
    lacking = tuple(name for name in needed if name not in tensors and not architecture.may_lack(name) and not _matches(name, _EXCUSED))
    if len(strays) > len(tensors):
        return None
    return Components(names=components, naming=naming.kind, tensors=tensors, strays=strays, left_out=left_out, lacking=lacking)


def _full_name(architecture: Architecture) -> str:
    return f"{architecture.name}/{architecture.variant}" if architecture.variant else architecture.name


def _matches(name: str, globs: Collection[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


@functools.cache
def _namings(name: str) -> tuple[_Naming, ...]:
    """List what files might call the tensors of an architecture: each component by itself, and all of them."""
    architecture = architecture_named(name)
    layout = architecture.layout()
    alone = [_original(component, architecture, layout) for component in architecture.components]
    whole = _Naming(kind="original", places={name: (name, 0) for name in layout}, made=dict.fromkeys(layout, ("", ())))
    return tuple(naming for naming in (whole, *alone, *_diffusers(architecture)) if naming.places) if architecture.components else ()


def _original(component: str, architecture: Architecture, layout: Collection[str]) -> _Naming:
    """Leave out what a component's names begin with."""
    places: dict[str, tuple[str, int]] = {}
    for root in roots_of(component, architecture):
        for name in layout:
            if name.startswith(root) and architecture.component_of(name) == component:
                places.setdefault(name.removeprefix(root), (name, 0))
    shared = places.get("shared.weight")
    if shared:  # transformers' T5 has the table twice, and files have one of the two
        places["encoder.embed_tokens.weight"] = shared
    return _Naming(kind="original", places=places, made={original: ("", ()) for original, _ in places.values()})


def _diffusers(architecture: Architecture) -> Iterator[_Naming]:
    """Name tensors as diffusers and transformers do, each component by itself and all behind theirs."""
    naming = diffusers_names(_full_name(architecture))
    if naming is None:
        return
    made = {name: (place.how, place.sizes) for name, place in naming.places.items()}
    alone: dict[str, dict[str, tuple[str, int]]] = {}
    for (component, name), place in naming.originals.items():
        alone.setdefault(component, {})[name] = place
    scales = {architecture.component_of(name): name for name in architecture.layout() if name.endswith("logit_scale")}
    for places in alone.values():
        original = next(iter(places.values()))[0]
        if scale := scales.get(architecture.component_of(original)):
            places.setdefault("logit_scale", (scale, 0))
            made[scale] = ("", ())
        yield _Naming(kind="diffusers", places=places, made=made)
    yield _Naming(kind="diffusers", places={f"{c}.{name}": place for c, places in alone.items() for name, place in places.items()}, made=made)
