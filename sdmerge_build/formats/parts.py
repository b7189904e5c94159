"""Owns the choice of files: which files of a diffusers folder, or of a sharded checkpoint, make up one checkpoint.

Has never heard of what is in those files or where they lie; it is given a listing and reads the small JSON files that say what belongs together.
File names: what diffusers and transformers write with `save_pretrained`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdmerge_build.errors import IntegrityError, Issue, SdbuildError, SourceError, named_briefly
from sdmerge_build.files import read_regular

__all__ = ["MODEL_INDEX", "Part", "choose_parts", "find_parts", "is_entry", "is_folder_checkpoint"]

MODEL_INDEX = "model_index.json"
MAX_INDEX = 16 << 20  # bytes; ten times the largest real index
MAX_FIELDS = 200_000  # of an index; keeps hostile JSON from filling memory
MAX_PARTS = 1_000  # ten times the most shards that models are cut into

_SHARD_INDEX = re.compile(r"[^/]+\.safetensors\.index(\.[A-Za-z0-9_]+)?\.json")
_WITH_WEIGHTS = re.compile(r"unet|vae|(text_encoder|transformer)(_[2-9])?")
_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = ("diffusion_pytorch_model", "pytorch_model")
_VARIANTS = ("", ".fp16")  # the full one first


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One safetensors file of a checkpoint: its component (empty when the file is a shard of a single checkpoint) and its path.

    The path is a posix path, seen from the folder of the index. `claimed` are the tensors that a shard's index says are in it, sorted; None where
    no index speaks of the file. Two parts are equal when component and path are.
    """

    component: str
    path: str
    claimed: tuple[str, ...] | None = field(default=None, compare=False, repr=False)


def is_folder_checkpoint(path: Path) -> bool:
    """Tell whether a path is a diffusers folder, or an index that `find_parts` can read."""
    try:
        return (path / MODEL_INDEX).is_file() if path.is_dir() else is_entry(path.name) and path.is_file()
    except OSError:
        return False


def find_parts(path: Path) -> tuple[Path, tuple[Part, ...]]:
    """Choose the files of a local diffusers folder, of its `model_index.json`, or of the index of a sharded checkpoint.

    Returns the folder that the parts' paths are seen from. Raises what `choose_parts` does, and `SourceError` for what cannot be read.
    """
    root, entry = (path, MODEL_INDEX) if path.is_dir() else (path.parent, path.name)
    try:
        return root, choose_parts(entry, _listing(root), lambda name: read_regular(root / name, MAX_INDEX))
    except SdbuildError as error:
        raise type(error)(*(replace(issue, where=str(root / issue.where)) for issue in error.issues)) from error
    except OSError as error:
        raise SourceError(Issue(where=str(error.filename or path), what=f"cannot be read: {error.strerror}")) from error


def choose_parts(entry: str, names: Collection[str], read: Callable[[str], bytes]) -> tuple[Part, ...]:
    """Choose the files that make up a checkpoint, in the order of their names.

    `entry` is the name of `model_index.json` or of a shards' index, `names` are the files in its folder and below, as posix paths seen from
    there, and `read` returns the bytes of one of them. Raises `IntegrityError` for an index that cannot be believed, and `SourceError` with
    every file missing.
    """
    choice = _Choice(entry, names, read)
    if not is_entry(entry):
        choice.refuse(entry, f"is neither `{MODEL_INDEX}` nor the index of a sharded safetensors file")
    elif entry not in names:
        choice.miss(entry, "is not there")
    elif entry == MODEL_INDEX:
        choice.add_components()
    else:
        choice.add_shards("", entry)
    return choice.parts()


def is_entry(name: str) -> bool:
    """Tell from its name whether a file is the index of a checkpoint that lies in several files."""
    return name == MODEL_INDEX or _SHARD_INDEX.fullmatch(name) is not None


def _listing(root: Path) -> set[str]:
    """List the files of a folder, and of those folders in it that are named like components."""
    paths = list(root.iterdir())
    paths += [path for folder in paths if _WITH_WEIGHTS.fullmatch(folder.name) and folder.is_dir() for path in folder.iterdir()]
    return {path.relative_to(root).as_posix() for path in paths if path.is_file()}


class _Choice:
    """The parts chosen so far, and what was wrong on the way."""

    def __init__(self, entry: str, names: Collection[str], read: Callable[[str], bytes]) -> None:
        self._entry, self._names, self._read = entry, names, read
        self._parts: list[Part] = []
        self._refused: list[Issue] = []
        self._missing: list[Issue] = []

    def refuse(self, where: str, what: str) -> None:
        """Complain of an index that cannot be believed."""
        self._refused.append(Issue(where=where, what=what))

    def miss(self, where: str, what: str, hint: str = "") -> None:
        """Complain of a file that is not there."""
        self._missing.append(Issue(where=where, what=what, hint=hint))

    def parts(self) -> tuple[Part, ...]:
        """Return what was chosen, or raise every complaint."""
        if self._refused:
            raise IntegrityError(*self._refused)
        if self._missing:
            raise SourceError(*self._missing)
        return tuple(sorted(self._parts))

    def add_components(self) -> None:
        """Choose the files of every component with weights that `model_index.json` names."""
        table = self._table(self._entry)
        if table is None:
            return
        named = 0
        for name, value in table.items():
            if not _WITH_WEIGHTS.fullmatch(name):
                continue
            if not isinstance(value, list) or len(value) != 2 or not all(item is None or isinstance(item, str) for item in value):
                self.refuse(self._entry, f"component `{name}` is not a library and a class")
            elif any(value):
                self._add_component(name)
            named += value != [None, None]
        if not named:
            self.refuse(self._entry, "names no component with weights: no `unet`, `vae`, `text_encoder` or `transformer`")

    def _add_component(self, component: str) -> None:
        for name in _candidates(component):
            if name not in self._names:
                continue
            if name.endswith(".json"):
                self.add_shards(component, name)
            else:
                self._parts.append(Part(component, name))
            return
        pickles = [f"{component}/{stem}{variant}.bin" for variant in _VARIANTS for stem in _PICKLES]
        if found := [name for name in pickles if name in self._names]:
            hint = "a `.bin` is a pickle and can be converted by itself; put the safetensors file made of it beside it"
            self.miss(found[0], f"component `{component}` is there as a `.bin` only", hint)
        else:
            self.miss(component, f"component `{component}` has no safetensors file: no {named_briefly(_candidates(component), most=2)}")

    def add_shards(self, component: str, index: str) -> None:
        """Choose the shards that an index names."""
        table = self._table(index)
        if table is None:
            return None
        weight_map = table.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            return self.refuse(index, "has no `weight_map` that says which file each tensor is in")
        shards: dict[str, list[str]] = {}
        for tensor, file in weight_map.items():
            shards.setdefault(file, []).append(tensor)
        if strange := sorted(file for file in shards if not _is_beside(file)):
            return self.refuse(index, f"names {named_briefly(name[:80] for name in strange)}; a shard is a safetensors file beside its index")
        if len(shards) > MAX_PARTS:
            return self.refuse(index, f"names {len(shards)} shards; no more than {MAX_PARTS} are read")
        folder = index[: index.rfind("/") + 1]
        for file in sorted(shards):
            if folder + file in self._names:
                self._parts.append(Part(component, folder + file, tuple(sorted(shards[file]))))
            else:
                self.miss(folder + file, f"this shard is not there; `{index}` names it")

    def _table(self, name: str) -> dict[str, Any] | None:
        """Read a JSON table, or complain of it."""
        raw = self._read(name)
        if len(raw) > MAX_INDEX or max(map(raw.count, (b":", b",", b"["))) > MAX_FIELDS:
            return self.refuse(name, f"is too large: {MAX_INDEX} bytes and {MAX_FIELDS} fields are read at most")
        try:
            table = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            return self.refuse(name, f"is not valid JSON: {error}")
        return table if isinstance(table, dict) else self.refuse(name, "is not a JSON table")


def _candidates(component: str) -> Iterator[str]:
    """Name the files that may hold a component, the likeliest first."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            yield f"{component}/{stem}{variant}.safetensors"
            yield f"{component}/{stem}.safetensors.index{variant}.json"
            if variant:
                yield f"{component}/{stem}{variant}.safetensors.index.json"


def _is_beside(file: str) -> bool:
    """Tell whether an index names a plain safetensors file in its own folder, on any system."""
    return file.endswith(".safetensors") and len(file) <= 255 and file.isprintable() and not re.search(r"[/\\:]", file)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"`{twice[:80]}` is named twice")
    return table
