"""Owns the bill of materials: CycloneDX 1.6 with the whole ancestry as nested pedigree, the model card's data, and how it was built.

Has never heard of the clock, or of libraries for this format: none of them writes model cards or formulations.
Format: https://cyclonedx.org/docs/1.6/json/. A component is described once; wherever else it is an ancestor, it is named by its reference.
"""

from __future__ import annotations

import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from sdmerge_build import __version__
from sdmerge_build.digest import is_hex
from sdmerge_build.licences import in_words
from sdmerge_build.release.reading import PROJECT, SPDX_IDS, Manifest, ancestor_of, author_of, license_of, page, release_of, terms_of, title_of
from sdmerge_build.release.writing import address, canonical

__all__ = ["bill_of_materials"]

MAX_NESTING = 16
"""Generations that stand inside one another; older ones stand beside them, since readers of JSON have stacks."""

MAX_VERSION = 1024  # the schema's own limit
_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+(?: (?:AND|OR) [A-Za-z0-9.+-]+)+")
Component = dict[str, Any]


def bill_of_materials(manifest: Manifest) -> str:
    """Write the bill as sorted JSON. Its serial number is made of its content."""
    family = _Family(manifest)
    subject, beside = family.nested()
    bill: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject, "tools": {"components": [_tool(manifest)]}},
        "components": beside,
        "dependencies": [{"ref": ref, "dependsOn": family.parents[ref]} for ref in family.components],
        "formulation": [{"bom-ref": "formula", "workflows": [_workflow(manifest, family)]}],
    }
    return canonical({**bill, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, PROJECT + '#' + canonical(bill))}"}) + "\n"


def _tool(manifest: Manifest) -> Component:
    version = manifest.get("reproduce", {}).get("versions", {}).get("sdbuild", __version__)
    return {"type": "application", "bom-ref": "tool:sdbuild", "name": "sdbuild", "version": str(version)[:MAX_VERSION]}


class _Family:
    """Every component of the ancestry under its reference, flat, and the references of its parents."""

    def __init__(self, manifest: Manifest) -> None:
        self.components: dict[str, Component] = {}
        self.parents: dict[str, list[str]] = defaultdict(list)
        self.subject = f"model:{manifest['artifact']['name']}"
        self._names: dict[str, str] = {}
        self._add(self.subject, _subject(manifest))
        for source in manifest.get("source", []):
            self._names[source["name"]] = self._add(f"source:{source['name']}", _source(manifest, source))
        for claim in manifest.get("claimed", []):
            ref = self._add(f"claimed:{claim.get('sha256') or (claim['by'], claim['name'])}", _claimed(manifest, claim))
            self._join(self._names.get(claim["by"], self.subject), ref)
        for step in manifest.get("step", []):
            is_subject = step["name"] == manifest["artifact"]["name"]
            self._names[step["name"]] = self.subject if is_subject else self._add(f"step:{step['name']}", _intermediate(step))
        for step in manifest.get("step", []):
            for name in step.get("inputs", {}).values():
                if name in self._names:
                    self._join(self._names[step["name"]], self._names[name])

    def ref(self, name: str) -> str:
        """Return the reference of a source or step; empty for names that nothing has."""
        return self._names.get(name, "")

    def _add(self, ref: str, component: Component) -> str:
        self.components.setdefault(ref, {"bom-ref": ref, **component})
        return ref

    def _join(self, ref: str, parent: str) -> None:
        if parent != ref and parent not in self.parents[ref]:
            self.parents[ref].append(parent)

    def nested(self) -> tuple[Component, list[Component]]:
        """Put every component inside the first child that names it, and those of too many generations ago beside them all."""
        seen: set[str] = set()
        subject = self._tree(self.subject, MAX_NESTING, seen)
        beside = [self._tree(ref, MAX_NESTING, seen) for ref in reversed(self.components) if ref not in seen]  # children come last
        return subject, beside

    def _tree(self, ref: str, generations: int, seen: set[str]) -> Component:
        seen.add(ref)
        ancestors = []
        for parent in self.parents[ref]:
            is_here = parent not in seen and generations > 1
            ancestors.append(self._tree(parent, generations - 1, seen) if is_here else self._mention(parent))
        return self.components[ref] | ({"pedigree": {"ancestors": ancestors}} if ancestors else {})

    def _mention(self, ref: str) -> Component:
        """Name a component that is described elsewhere; a second one with its reference would be an error."""
        whole = self.components[ref]
        return {"type": whole["type"], "name": whole["name"], "properties": [_property("ref", ref)]}


def _subject(manifest: Manifest) -> Component:
    artifact, release = manifest["artifact"], release_of(manifest)
    properties = [_property(key, artifact[key]) for key in ("key", "tensor_digest", "size", "tensors", "parameters", "rehearsal") if key in artifact]
    terms = terms_of(manifest)
    properties += [_property(f"terms.{key}", terms[key]) for key in ("share", "status", "policy", "summary") if terms.get(key)]
    author = author_of(manifest)
    return {
        "type": "machine-learning-model",
        "name": title_of(manifest),
        **({"version": str(release["version"])[:MAX_VERSION]} if release.get("version") else {}),
        **({"authors": [{"name": author}]} if author else {}),
        **({"description": artifact["description"]} if artifact.get("description") else {}),
        **_hashes(artifact),
        **_licenses(_own_licenses(manifest)),
        "modelCard": _model_card(manifest),
        "properties": properties,
    }


def _source(manifest: Manifest, source: Manifest) -> Component:
    ancestor = ancestor_of(manifest, source["name"])
    licenses = [_license(str(layer.get("id") or layer.get("title") or ""), "declared", layer) for layer in ancestor.get("layer", [])]
    if not licenses and source.get("license"):
        licenses = [_license(str(source["license"]), "declared", {})]
    told = {
        "tensor_digest": source.get("tensor_digest"),
        "share": source.get("share"),
        "credit": source.get("credit") or ancestor.get("credit"),
        "uri": source.get("uri"),
        "converted_from": source.get("converted_from"),
        "terms.status": ancestor.get("status"),
        "contributes": "no" if ancestor.get("contributes", True) is False else None,
    }
    where = page(source) or address(ancestor.get("homepage", ""))
    return {
        "type": "machine-learning-model",
        "name": source["name"],
        **_hashes(source),
        **_licenses(licenses),
        **({"externalReferences": [{"type": "website", "url": where}]} if where else {}),
        "properties": [_property(key, value) for key, value in told.items() if value not in {None, ""}],
    }


def _claimed(manifest: Manifest, claim: Manifest) -> Component:
    ancestor = ancestor_of(manifest, claim["name"], claim["by"])
    licenses = [_license(str(layer.get("id") or layer.get("title") or ""), "declared", layer) for layer in ancestor.get("layer", [])]
    return {
        "type": "machine-learning-model",
        "name": claim["name"],
        **_hashes(claim),
        **_licenses(licenses),
        "properties": [_property("claimed_by", claim["by"]), _property("verified", "no")],
    }


def _intermediate(step: Manifest) -> Component:
    told = {"method": step["method"], "formula": step.get("formula"), "key": step.get("key")}
    return {
        "type": "machine-learning-model",
        "name": step["name"],
        "properties": [_property(key, value) for key, value in told.items() if value],
    }


def _property(name: str, value: object) -> dict[str, str]:
    return {"name": f"sdbuild:{name}", "value": str(value)}


def _hashes(entry: Manifest) -> dict[str, Any]:
    hashes = [{"alg": alg, "content": entry[key]} for alg, key in (("SHA-256", "sha256"), ("BLAKE3", "blake3")) if is_hex(entry.get(key))]
    return {"hashes": hashes} if hashes else {}


def _own_licenses(manifest: Manifest) -> list[Component]:
    """Describe what the result comes under: as concluded, and as declared where its author says so.

    The format has expressions only by themselves; beside another licence an expression is a name.
    """
    terms, declared = terms_of(manifest), release_of(manifest).get("license")
    concluded = str(terms.get("license") or "")
    if _EXPRESSION.fullmatch(concluded) and not declared:
        return [{"expression": concluded, "acknowledgement": "concluded"}]
    licenses = [_license(concluded, "concluded", {"title": terms.get("license_title")})] if concluded else []
    return licenses + ([_license(license_of(manifest), "declared", {})] if declared else [])


def _license(license_id: str, acknowledgement: str, layer: Manifest) -> Component:
    is_known = license_id in SPDX_IDS
    url = address(layer.get("url") or "")
    told = {"title": layer.get("title"), "source": layer.get("source")}
    properties = [_property(f"license.{key}", value) for key, value in told.items() if value and value != license_id]
    name = license_id or "unknown"
    return {
        "license": {
            **({"id": license_id} if is_known else {"name": name}),
            "acknowledgement": acknowledgement,
            **({"url": url} if url else {}),
            **({"properties": properties} if properties else {}),
        }
    }


def _licenses(licenses: list[Component]) -> dict[str, Any]:
    return {"licenses": licenses} if licenses else {}


def _model_card(manifest: Manifest) -> dict[str, Any]:
    artifact, terms = manifest["artifact"], terms_of(manifest)
    restrictions = [{"name": in_words(text)} for text in terms.get("concluded", {}).get("use_restrictions", [])]
    formats = [_property(f"dtype.{name}", count) for name, count in sorted(artifact.get("dtypes", {}).items())]
    return {
        "modelParameters": {"task": "text-to-image", "architectureFamily": str(artifact.get("architecture", "")), "inputs": [{"format": "text"}],
                            "outputs": [{"format": "image"}]},
        **({"considerations": {"ethicalConsiderations": restrictions}} if restrictions else {}),
        **({"properties": formats} if formats else {}),
    }  # fmt: skip


def _workflow(manifest: Manifest, family: _Family) -> dict[str, Any]:
    """Describe how it was built: one task per step, and the command that does them all."""
    reproduce = manifest.get("reproduce", {})
    tasks = list(_tasks(manifest, family))
    workflow: dict[str, Any] = {
        "bom-ref": "workflow",
        "uid": str(manifest["artifact"].get("key") or manifest["artifact"]["sha256"]),
        "taskTypes": ["build"],
        "outputs": [{"type": "artifact", "resource": {"ref": family.subject}}],
    }
    if reproduce.get("command"):
        workflow["steps"] = [{"name": "merge", "commands": [{"executed": reproduce["command"]}]}]
    recipes: Mapping[str, str] = {str(reproduce.get("recipe")): reproduce.get("recipe_digest")} | dict(reproduce.get("recipes", {}))
    workflow["properties"] = [_property(f"recipe.blake3:{name}", digest) for name, digest in recipes.items() if digest]
    workflow["properties"] += [_property(f"version.{name}", text) for name, text in sorted(reproduce.get("versions", {}).items())]
    return workflow | ({"tasks": tasks} if tasks else {})


def _tasks(manifest: Manifest, family: _Family) -> Iterator[dict[str, Any]]:
    for step in manifest.get("step", []):
        inputs = [
            {"resource": {"ref": family.ref(name)}, "properties": [_property("role", role)]}
            for role, name in step.get("inputs", {}).items()
            if family.ref(name)
        ]
        facts = {"method": step["method"], "formula": step.get("formula"), **step.get("facts", {})}
        yield {
            "bom-ref": f"task:{step['name']}",
            "uid": str(step.get("key") or step["name"]),
            "name": step["name"],
            "taskTypes": ["build"],
            **({"inputs": inputs} if inputs else {}),
            "outputs": [{"type": "artifact", "resource": {"ref": family.ref(step["name"])}}],
            "properties": [_property(name, value) for name, value in facts.items() if value],
        }
