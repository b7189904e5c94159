"""Owns what a checkpoint's own header claims of its origin, in whatever dialect its maker wrote it, and however hostile it is.

Has never heard of files, recipes of ours or licences: what it yields is the word of whoever wrote the header, readable, and verified by nobody.
Dialects: AUTOMATIC1111 and its forks (`modules/extras.py`), supermerger, Chattiori, model-mixer, SD.Next, sd-mecha, ComfyUI, kohya, ModelSpec, ours.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdmerge_build.claims.comfyui import files_of, listed, merges_of, saved
from sdmerge_build.claims.register import MAX_CLAIMS, Claimed, Register, hashes_of, mentioned, title_of
from sdmerge_build.claims.text import MOST_MEMBERS, TooDeepError, cut, encodable, kept, line, parsed
from sdmerge_build.digest import is_hex

__all__ = ["CLAIMS", "MAX_CLAIM", "MAX_CLAIMS", "Claimed", "Claims", "encodable", "read_claims", "webui_models"]

CLAIMS = (
    *("sdbuild.lineage", "sd_merge_models", "sd_merge_recipe", "checkpoint", "lora", "mecha_recipe", "prompt", "workflow"),
    *("ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash"),
    *("modelspec.title", "modelspec.author", "modelspec.license", "modelspec.merged_from"),
)
"""The fields of a header that are read."""

MAX_CLAIM = 1 << 20  # characters of one field
_MOST_READ = 10 * MAX_CLAIMS  # mentions of ancestors, the same ones over again included
_MOST_GENERATIONS = 16  # tables of models within tables of models

_MAKERS = {
    "webui": "AUTOMATIC1111",
    "Neo": "Forge Neo",
    "sd-webui-supermerger": "supermerger",
    "merge-models-chattiori": "Chattiori",
    "sd-webui-model-mixer": "model-mixer",
    "SDNext": "SD.Next",
    "sdbuild": "sdbuild",
}
_METHODS = ("formula", "interp_method", "merge_method", "merge_mode", "mode")
_PARAMETERS = (
    *("multiplier", "alpha", "beta", "base_alpha", "base_beta", "alpha_info", "beta_info", "weights_alpha", "weights_beta"),
    *("block_weights", "calcmode", "calculation", "elemental_merge", "elemental", "adjust", "bake_in_vae", "bake_in_te"),
)
_PARENTS = re.compile(r"(?:primary|secondary|tertiary)_model_hash|model_[a-z]|base_model|checkpoint_hash|lora_hash|bake_in_vae|bake_in_te")
_HASHES = re.compile(r"[0-9a-f]{8,12}|[0-9a-fA-F]{64}(?:,[0-9a-fA-F]{64})*+")
_MECHA = re.compile(r'^[ \t]*(model|merge)[ \t]+"((?:[^"\\\n]|\\.)*+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What one header claims; `ancestors` are in an order that only the header's text decides."""

    made_by: str = ""
    recipe: str = ""  # "Weighted sum, multiplier 0.3"
    title: str = ""
    author: str = ""
    license: str = ""
    ancestors: tuple[Claimed, ...] = ()
    notes: tuple[str, ...] = ()


def read_claims(metadata: Mapping[str, str]) -> Claims:
    """Read what a header claims, in every dialect it speaks; what cannot be read is passed over, with a note. Never raises."""
    reader = _Reader(metadata)
    register = Register()
    mentions = reader.mentions()
    for claimed in itertools.islice(mentions, _MOST_READ):
        register.add(claimed)
    if register.is_full or next(mentions, None):
        reader.note(f"more ancestors are named than are read: {len(register.ancestors)} are listed")
    made_by, recipe = reader.making()
    title, author, license_ = (line(reader.field(f"modelspec.{name}")) for name in ("title", "author", "license"))
    return Claims(
        made_by=made_by, recipe=recipe, title=title, author=author, license=license_, ancestors=tuple(register.ancestors), notes=tuple(reader.notes)
    )


def webui_models(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read the ancestors that `sd_merge_models` names, by sha256, in the form in which AUTOMATIC1111 hands them on; at most `MAX_CLAIMS`."""
    table = _Reader(metadata).table("sd_merge_models")
    models = {
        sha256: {"name": encodable(entry["name"]), "legacy_hash": entry.get("legacy_hash"), "sd_merge_recipe": entry.get("sd_merge_recipe")}
        for sha256, entry in _models(table).items()
        if isinstance(entry.get("name"), str)
    }
    return dict(itertools.islice(models.items(), MAX_CLAIMS))


class _Reader:
    """One header, read field by field; `notes` says what could not be read."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata
        self._tables: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, None] = {}

    def note(self, text: str) -> None:
        """Note what could not be read, once."""
        self.notes[text] = None

    def field(self, name: str) -> str:
        """Return a field of a length that is read; nothing when there is none."""
        text: Any = self._metadata.get(name)
        if text is None:
            return ""
        if not isinstance(text, str):
            return self.note(f"`{name}` is not text") or ""
        if len(text) > MAX_CLAIM:
            return self.note(f"`{name}` has {len(text)} characters; no more than {MAX_CLAIM} are read") or ""
        return text

    def table(self, name: str) -> dict[str, Any]:
        """Return a field that is a JSON table; an empty one when it is none."""
        if name not in self._tables:
            self._tables[name] = self.inner(self.field(name) or None, f"`{name}`")
        return self._tables[name]

    def inner(self, value: Any, what: str) -> dict[str, Any]:
        """Return a table that stands somewhere, as it is or as JSON text."""
        if isinstance(value, str):
            try:
                value = parsed(value)
            except (ValueError, RecursionError) as error:
                return self.note(f"{what} {error if isinstance(error, TooDeepError) else 'is not JSON'}") or {}
        if value is None:
            return {}
        return value if isinstance(value, dict) else self.note(f"{what} is not a table") or {}

    def making(self) -> tuple[str, str]:
        """Say who made the file, and how."""
        merged = self._recipe()
        if kind := line(merged.get("type")):
            return "Chattiori" if kind.endswith("-chattiori") else _MAKERS.get(kind, kind), _recipe_line(merged)
        if lineage := self.table("sdbuild.lineage"):
            return "sdbuild", _last_step(lineage)
        if mecha := self.field("mecha_recipe"):
            return "sd-mecha", cut(", ".join(line(method) for method in _mecha(mecha, "merge")[:MOST_MEMBERS]))
        if nodes := saved(self.table("prompt")) or listed(self.table("workflow")):
            return "ComfyUI", merges_of(nodes)
        return "kohya" if self.field("ss_sd_model_name") or self.field("ss_new_sd_model_hash") else "", _recipe_line(merged)

    def mentions(self) -> Iterator[Claimed]:
        """Yield every mention of an ancestor, those that say most of it first."""
        yield from self._lineage()
        yield from self._models(self.table("sd_merge_models"), "sd_merge_models")
        yield from _parents(self._recipe(), "sd_merge_recipe")
        if "lora_hash" in self._recipe():
            yield from self._baked()
        mecha = self.field("mecha_recipe")
        if mecha and not mecha.lstrip().startswith("version"):
            self.note("`mecha_recipe` does not begin with a version")
        for path in _mecha(mecha, "model"):
            yield from mentioned(re.sub(r"\\(.)", r"\1", path), "mecha_recipe")
        yield from self._loaded()
        name, short, long = (self.field(f"ss_{field}") for field in ("sd_model_name", "sd_model_hash", "new_sd_model_hash"))
        yield from mentioned(name, "ss_sd_model_name", (hashes_of(long)[0], hashes_of(short)[1]))
        for title in dict.fromkeys(self.field("modelspec.merged_from").split(",")):
            yield from mentioned(title, "modelspec.merged_from")

    def _recipe(self) -> dict[str, Any]:
        """Return the recipe of the file itself; where a LoRA was baked in, Chattiori writes it in the place of the models."""
        models = self.table("sd_merge_models")
        return models if "lora_hash" in models and isinstance(models.get("type"), str) else self.table("sd_merge_recipe")

    def _lineage(self) -> Iterator[Claimed]:
        lineage = self.table("sdbuild.lineage")
        sources = lineage.get("sources", [])
        if "omitted" in lineage:
            self.note("`sdbuild.lineage` is left out of the header: it is in the file's manifest")
        elif not isinstance(sources, list):
            self.note("`sdbuild.lineage` has no list of sources")
        for entry in sources if isinstance(sources, list) else []:
            if not isinstance(entry, dict):
                self.note("`sdbuild.lineage` has a source that is not a table")
                continue
            sha256, _ = hashes_of(entry.get("sha256"))
            name = title_of(entry.get("name"))[0] or sha256[:10] or "(unnamed)"
            yield Claimed(
                name=name,
                sha256=sha256,
                said_in="sdbuild.lineage",
                license=line(entry.get("license")),
                credit=line(entry.get("credit")),
                homepage=line(entry.get("homepage")),
                uri=line(entry.get("uri")),
                permissions=kept(entry.get("permissions")),
                evidence=kept(entry.get("evidence")),
                status=line(entry.get("status")) or "unknown",
            )

    def _models(self, outermost: dict[str, Any], said_in: str) -> Iterator[Claimed]:
        """Yield the models of a table, of the tables that newer Forge puts into it, and of the recipes in both."""
        tables, table, mentions = [outermost], outermost, []
        while inner := self.inner(table.get("sd_merge_models"), f"the table within `{said_in}`"):
            if len(tables) == _MOST_GENERATIONS:
                self.note(f"`{said_in}` has more than {_MOST_GENERATIONS} tables within each other")
                break
            tables.append(table := inner)
        for table in tables:
            models = {} if "lora_hash" in table else _models(table)
            strays = len(table) - len(models) - len(table.keys() & {"sd_merge_models", "sd_merge_recipe"})
            if strays > 0 and "lora_hash" not in table:
                self.note(f"`{said_in}` has entries that are no model under its sha256")
            for sha256, entry in models.items():
                recipe = self.inner(entry.get("sd_merge_recipe"), f"a recipe within `{said_in}`")
                legacy = hashes_of(entry.get("legacy_hash"))[1]
                yield from (replace(claimed, recipe=_recipe_line(recipe)) for claimed in mentioned(entry.get("name"), said_in, (sha256, legacy)))
                mentions.append(recipe)
            mentions.append(self.inner(table.get("sd_merge_recipe"), f"a recipe within `{said_in}`"))
        for recipe in mentions:
            yield from _parents(recipe, said_in)

    def _baked(self) -> Iterator[Claimed]:
        """Yield what Chattiori keeps of a LoRA's and its checkpoint's own headers."""
        checkpoint = self.table("checkpoint")
        yield from self._models(self.inner(checkpoint.get("sd_merge_models"), "`sd_merge_models` within `checkpoint`"), "checkpoint")
        yield from _parents(self.inner(checkpoint.get("sd_merge_recipe"), "`sd_merge_recipe` within `checkpoint`"), "checkpoint")
        for sha256, entry in _models(self.table("lora")).items():
            yield from mentioned(line(entry.get("ss_output_name")), "lora", (sha256, ""))

    def _loaded(self) -> Iterator[Claimed]:
        """Yield the files that ComfyUI loaded for what it saved."""
        nodes, said_in = saved(self.table("prompt")), "prompt"
        if not nodes:
            nodes, said_in = listed(self.table("workflow")), "workflow"
        for name in files_of(nodes):
            yield from mentioned(name, said_in)


def _models(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a table that stand under a sha256, sorted."""
    entries = sorted((sha256.lower(), sha256) for sha256, entry in table.items() if isinstance(entry, dict))
    return {lower: table[sha256] for lower, sha256 in entries if is_hex(lower)}


def _parents(recipe: Mapping[str, Any], said_in: str) -> Iterator[Claimed]:
    """Yield what a recipe was made of, by hash or by name."""
    for key in sorted(filter(_PARENTS.fullmatch, recipe)):
        for value in recipe[key] if isinstance(recipe[key], list) else [recipe[key]]:
            if isinstance(value, str):
                parts = dict.fromkeys(value.split(",")) if _HASHES.fullmatch(value) else ()
                for part in parts:
                    yield from mentioned("", said_in, hashes_of(part))
                if not parts:
                    yield from mentioned(value, said_in)


def _recipe_line(recipe: Mapping[str, Any]) -> str:
    """Say in a line what a recipe does."""
    method = next((text for name in _METHODS if (text := line(recipe.get(name)))), "LoRA baked in" if "lora_hash" in recipe else "")
    said = ((name.replace("_", " "), line(recipe.get(name), 100)) for name in _PARAMETERS)
    return cut(", ".join([method, *(f"{name} {text}" for name, text in said if text not in {"", "None", "False"})]).removeprefix(", "))


def _last_step(lineage: Mapping[str, Any]) -> str:
    """Say in a line what the last step of a lineage of ours does, with the names of its inputs in its formula."""
    steps = lineage.get("steps")
    step = steps[-1] if isinstance(steps, list) and steps else None
    facts, inputs = (step.get("facts"), step.get("inputs")) if isinstance(step, dict) else (None, None)
    if not isinstance(facts, dict):
        return ""
    names = inputs if isinstance(inputs, dict) else {}
    formula = re.sub(r"\[([^\[\]]*)\]", lambda mark: line(names.get(mark[1], mark[0])), line(facts.get("param.formula")))
    params = sorted(name for name in facts if name.startswith("param.") and name != "param.formula")[:MOST_MEMBERS]
    said = (f"{name.removeprefix('param.')} {line(facts[name], 100)}" for name in params)
    return line(", ".join([formula or line(facts.get("method")), *said]))


def _mecha(text: str, command: str) -> list[str]:
    """List what a recipe of sd-mecha says of models or merges, each once."""
    return list(dict.fromkeys(said for verb, said in _MECHA.findall(text) if verb == command))
