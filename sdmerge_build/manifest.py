"""Owns the manifest: the published lineage of one artifact, as TOML beside it, and what an earlier manifest says was described.

Has never heard of torch or the clock. A manifest needs no run: it is computed from the plan and the artifact's trace.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdmerge_build.ancestry import licence_files, said_terms
from sdmerge_build.claims import Claimed
from sdmerge_build.digest import blake3_hex
from sdmerge_build.errors import printable
from sdmerge_build.facts import Facts
from sdmerge_build.files import read_regular, replacing
from sdmerge_build.keys import Description
from sdmerge_build.licences import Conclusion
from sdmerge_build.lineage import readable_formula
from sdmerge_build.plan import Plan, Step
from sdmerge_build.store import Stored
from sdmerge_build.tensorfile import read_header
from sdmerge_build.testimony import claims_of
from sdmerge_build.tomltext import too_deep

__all__ = ["described_in", "is_current", "manifest_of", "manifest_path", "state_of", "terms_in", "write_manifest"]

VERSION = 1
_DECLARED = ("uri", "homepage", "filename", "license", "credit", "permissions")
_RELEASE = ("title", "version", "author", "license", "lineage")


def manifest_path(artifact: Path) -> Path:
    """Name the manifest of an artifact: `NAME.manifest.toml` beside `NAME.safetensors`."""
    return artifact.with_name(f"{artifact.stem}.manifest.toml" if artifact.suffix else f"{artifact.name}.manifest.toml")


def manifest_of(
    plan: Plan,
    step: Step,
    stored: Stored,
    described: Mapping[str, Description],
    facts: Mapping[str, Facts],
    terms: Conclusion,
    rehearsal: str,
) -> dict[str, Any]:
    """Compose a manifest, sources and steps in an order in which each comes after what it stands on."""
    names = plan.ancestors(step.name)
    used = [name for name in names if name in plan.sources]
    sources = []
    claimed: list[dict[str, Any]] = []
    for name, share in zip(used, _shares(stored, len(used)), strict=True):
        sources.append({"name": name} | share | _source(plan, name, facts[name]))
        claimed += [_claimed(name, entry) for entry in claims_of(facts[name].claims).ancestors]
    manifest: dict[str, Any] = {
        "manifest": VERSION,
        "artifact": _artifact(plan, step, stored) | ({"rehearsal": rehearsal} if rehearsal else {}),
        "reproduce": _reproduce(plan, step, stored, rehearsal),
        "source": sources,
        "step": [_step(plan.steps[n], described[n]) for n in names if n in plan.steps],
    }
    return manifest | ({"claimed": claimed} if claimed else {}) | _release(plan) | {"terms": _terms(plan, terms)}


def write_manifest(path: Path, manifest: Mapping[str, Any], state: str) -> None:
    """Write a manifest by one rename; `state` names what it was computed from, and stands with the digest of the rest in its first line."""
    import tomli_w  # noqa: PLC0415  a build with nothing to do needs no writer

    text = tomli_w.dumps(dict(manifest)).encode()
    with replacing(path) as file:
        file.write(_first_line(state, text) + b"\n" + text)


def _first_line(state: str, text: bytes) -> bytes:
    return f"# Written by sdbuild: how this artifact was made, and of what. Checksum {state} {blake3_hex(text)}".encode()


def state_of(plan: Plan, stored: Stored, facts: Mapping[str, Facts], terms: Conclusion) -> str:
    """Name everything that a manifest is computed from and that may change: the artifact, the recipes, the files, the terms."""
    sizes = {name: known.size for name, known in facts.items()}
    recipes = [printable(plan.recipe.path.name), plan.recipe.digest, _other_digests(plan)]
    said = [VERSION, stored.trace["artifact_key"], stored.sha256, recipes, sizes, _release(plan), _digest_of(terms), str(licence_files(plan))]
    return blake3_hex(json.dumps(said, sort_keys=True).encode())


@functools.lru_cache(maxsize=256)
def _digest_of(terms: Conclusion) -> str:
    return blake3_hex(json.dumps(terms.table(), sort_keys=True).encode())


def is_current(path: Path, state: str) -> bool:
    """Tell whether a manifest is there, was computed from `state`, and is as it was written."""
    try:
        first, _, rest = read_regular(path).partition(b"\n")
    except OSError:
        return False
    return first == _first_line(state, rest)


def described_in(path: Path) -> dict[str, Description]:
    """Read what a manifest says was described when its artifact was made; empty when there is none that can be read."""
    described: dict[str, Description] = {}
    table = _read(path)
    try:
        for entry in table.get("source", []):
            name, digest = _text(entry["name"]), _text(entry["tensor_digest"])
            described[name] = Description(name=name, key=digest, facts=[("tensors", digest)], inputs={})
        for entry in table.get("step", []):
            name, facts, inputs = _text(entry["name"]), _texts(entry["facts"]), _texts(entry["inputs"])
            described[name] = Description(name=name, key=_text(entry["key"]), facts=list(facts.items()), inputs=inputs)
    except (KeyError, TypeError):
        return {}
    return described


def terms_in(artifact: Path, key: str) -> dict[str, Any] | None:
    """Read the terms that the manifest beside an artifact says, if it speaks of this file, whose header has this key."""
    table = _read(manifest_path(artifact))
    try:
        is_its = bool(key) and table["step"][-1]["key"] == key and table["artifact"]["size"] == artifact.stat().st_size
        return _sound(table["terms"]) if is_its else None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError):
        return None


def _sound(terms: Any) -> dict[str, Any]:
    """Copy terms, which anybody may have edited, in the form in which they are printed. Raises `TypeError` where they have another."""
    sound: dict[str, Any] = {name: _text(terms[name]) for name in ("share", "policy", "license", "license_title", "status", "summary", "advice")}
    sound["concluded"] = {name: value if isinstance(value, bool) else _plain(value) for name, value in terms["concluded"].items()}
    for name, texts, lists in _ROWS:
        sound[name] = [_row(entry, texts, lists) for entry in terms.get(name, [])]
    for row, ancestor in zip(sound["ancestor"], terms.get("ancestor", []), strict=True):
        row["contributes"] = ancestor["contributes"] is True
        row["layer"] = [_row(layer, ("title", "source", "id", "url"), ()) for layer in ancestor.get("layer", [])]
    return sound


_ROWS = (
    ("ancestor", ("name", "status", "license", "license_title", "license_url", "credit", "homepage", "claimed_by"), ("notes",)),
    ("reason", ("component", "value", "ancestor", "license", "clause", "url"), ()),
    ("conflict", ("id", "level", "what", "hint"), ("ancestors", "rests_on")),
    ("duty", ("kind", "what", "url"), ("ancestors",)),
)
"""The tables of terms: their fields that are texts, and those that are lists of texts."""


def _row(entry: Mapping[str, Any], texts: tuple[str, ...], lists: tuple[str, ...]) -> dict[str, Any]:
    return {name: _text(entry.get(name, "")) for name in texts} | {name: _plain(entry.get(name, [])) for name in lists}


def _plain(value: Any) -> Any:
    """Return a text or a list of texts; anything else raises `TypeError`."""
    return [_text(item) for item in value] if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise TypeError
    return value


def _read(path: Path) -> dict[str, Any]:
    """Read a manifest that anybody may have edited; what is no manifest is empty."""
    try:
        text = read_regular(path).decode()
        return {} if too_deep(text) else tomllib.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}


def _shares(stored: Stored, count: int) -> list[dict[str, float]]:
    """Take the sources' shares from the trace, in the order of the ancestry; a trace that has none, or other ones, says nothing."""
    shares = stored.trace.get("shares")
    if not isinstance(shares, list) or len(shares) != count:
        return [{} for _ in range(count)]
    return [{"share": mean} | ({"share_least": least, "share_most": most} if least != most else {}) for mean, least, most in shares]


def _artifact(plan: Plan, step: Step, stored: Stored) -> dict[str, Any]:
    specs = read_header(stored.path).tensors.values()
    return {
        "name": step.name,
        "title": step.title,
        "size": stored.size,
        "sha256": stored.sha256,
        "model_hash": stored.sha256[:10],
        "tensor_digest": stored.tensor_digest,
        "key": stored.trace["artifact_key"],
        "architecture": plan.architecture.name,
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs),
        "dtypes": dict(sorted(Counter(spec.dtype for spec in specs).items())),
        **step.about,
    }


def _reproduce(plan: Plan, step: Step, stored: Stored, rehearsal: str) -> dict[str, Any]:
    flag = f" --rehearse={rehearsal}" if rehearsal else ""
    recipe = printable(plan.recipe.path.name)
    return {
        "command": f"sdbuild {recipe} --only {step.name}{flag}",
        "recipe": recipe,
        "recipe_digest": plan.recipe.digest,
        **({"recipes": _other_digests(plan)} if plan.others else {}),
        "versions": stored.trace["versions"],
    }


def _terms(plan: Plan, terms: Conclusion) -> dict[str, Any]:
    """Write down what the texts say, with the texts that the recipe itself holds."""
    table, files = terms.table(), licence_files(plan)
    for ancestor in table["ancestor"]:
        if (file := files.get(ancestor["name"])) and ancestor.get("layer"):
            ancestor["layer"][0] |= {"license_file": file.place, "license_sha256": file.sha256}
    return table


def _claimed(by: str, claimed: Claimed) -> dict[str, Any]:
    """Write down an ancestor that a parent's header names; nobody has verified it."""
    said = {name: getattr(claimed, name) for name in ("sha256", "short_hash", "license", "credit", "homepage", "uri", "recipe", "said_in")}
    return {"by": by, "name": claimed.name} | {name: text for name, text in said.items() if text}


def _release(plan: Plan) -> dict[str, Any]:
    """Say what the recipe says of a release, where it does."""
    release = plan.recipe.table.release
    said = {key: value for key in _RELEASE if (value := getattr(release, key, None)) is not None}
    return {"release": said} if release else {}


def _other_digests(plan: Plan) -> dict[str, str]:
    """List the digests of the recipes that were read beside the root, by their place seen from its folder."""
    return {name: recipe.digest for name, recipe in plan.others.items()}


def _source(plan: Plan, name: str, facts: Facts) -> dict[str, Any]:
    said = plan.sources[name]
    digests = {
        "sha256": facts.sha256 if said.sha256 or facts.kind else None,
        "blake3": facts.blake3 if said.blake3 else None,
        "converted_from": facts.kind or None,
    }
    told = {"size": facts.size, "tensor_digest": facts.tensors} | digests | {key: getattr(said, key) for key in _DECLARED}
    told |= {key: value for key, value in said_terms(said, facts).items() if key not in told or told[key] is None}
    return {key: value for key, value in told.items() if value is not None}


def _step(step: Step, description: Description) -> dict[str, Any]:
    formula = {"formula": readable_formula(step)} if step.method.name == "formula" else {}
    return {
        "name": step.name,
        "method": step.method.name,
        **formula,
        "key": description.key,
        "inputs": dict(description.inputs),
        "facts": dict(description.facts),
    }
