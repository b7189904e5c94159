"""Owns the manifest: the published lineage of one artifact, as TOML beside it, and what an earlier manifest says was described.

Has never heard of torch or the clock. A manifest needs no run: it is computed from the plan and the artifact's trace.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdmerge_build.errors import printable
from sdmerge_build.files import read_regular, replacing
from sdmerge_build.keys import Description
from sdmerge_build.lineage import claimed_ancestors, readable_formula
from sdmerge_build.plan import Plan, Step
from sdmerge_build.store import Stored
from sdmerge_build.supply import Facts
from sdmerge_build.tensorfile import read_header
from sdmerge_build.tomltext import too_deep

__all__ = ["described_in", "is_current", "manifest_of", "manifest_path", "write_manifest"]

VERSION = 1
_DECLARED = ("uri", "homepage", "filename", "license", "credit", "permissions")


def manifest_path(artifact: Path) -> Path:
    """Name the manifest of an artifact: `NAME.manifest.toml` beside `NAME.safetensors`."""
    return artifact.with_name(f"{artifact.stem}.manifest.toml" if artifact.suffix else f"{artifact.name}.manifest.toml")


def manifest_of(
    plan: Plan, step: Step, stored: Stored, described: Mapping[str, Description], facts: Mapping[str, Facts], rehearsal: str
) -> dict[str, Any]:
    """Compose a manifest, sources and steps in an order in which each comes after what it stands on."""
    names = plan.ancestors(step.name)
    used = [name for name in names if name in plan.sources]
    sources = []
    claimed: list[dict[str, Any]] = []
    for name, share in zip(used, _shares(stored, len(used)), strict=True):
        sources.append({"name": name} | share | _source(plan, name, facts[name]))
        claimed += [{"by": name, "sha256": sha256, "name": entry["name"]} for sha256, entry in claimed_ancestors(facts[name].claims).items()]
    manifest: dict[str, Any] = {
        "manifest": VERSION,
        "artifact": _artifact(plan, step, stored) | ({"rehearsal": rehearsal} if rehearsal else {}),
        "reproduce": _reproduce(plan, step, stored, rehearsal),
        "source": sources,
        "step": [_step(plan.steps[n], described[n]) for n in names if n in plan.steps],
    }
    return manifest | ({"claimed": claimed} if claimed else {})


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest by one rename."""
    import tomli_w  # noqa: PLC0415  a build with nothing to do needs no writer

    with replacing(path) as file:
        file.write(b"# Written by sdbuild: how this artifact was made, and of what.\n")
        tomli_w.dump(dict(manifest), file)


def is_current(path: Path, plan: Plan, stored: Stored, facts: Mapping[str, Facts]) -> bool:
    """Tell whether a manifest is there and speaks of this artifact, these recipes and these files."""
    table = _read(path)
    try:
        artifact, reproduce, sources = table["artifact"], table["reproduce"], table["source"]
        return (
            (artifact["key"], artifact["sha256"]) == (stored.trace["artifact_key"], stored.sha256)
            and (reproduce["recipe"], reproduce["recipe_digest"]) == (printable(plan.recipe.path.name), plan.recipe.digest)
            and reproduce.get("recipes", {}) == _other_digests(plan)
            and all(source["size"] == facts[source["name"]].size for source in sources)
        )
    except (KeyError, TypeError):
        return False


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
