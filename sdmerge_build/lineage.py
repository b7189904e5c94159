"""Owns what an artifact says of its origin: the metadata of its header, the shares of its sources, the ancestors its parents claim.

Has never heard of the store or the clock; the same plan and sources always yield the same text.
Formats: ModelSpec 1.0.1 (Stability AI), `sd_merge_recipe` and `sd_merge_models` (AUTOMATIC1111 `modules/extras.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdmerge_build.blend import Blend
from sdmerge_build.check import Checked
from sdmerge_build.digest import blake3_hex
from sdmerge_build.formula import relabelled
from sdmerge_build.keys import Description
from sdmerge_build.plan import Plan, Step
from sdmerge_build.supply import MAX_CLAIM, Facts

__all__ = ["Share", "claimed_ancestors", "metadata_of", "readable_formula", "shares_of"]

MAX_CLAIMS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A source's part in an artifact: the mean over all averaged elements, and its extremes over tensors."""

    mean: float
    least: float
    most: float


def metadata_of(plan: Plan, step: Step, described: Mapping[str, Description], facts: Mapping[str, Facts], rehearsal: str) -> dict[str, str]:
    """Compose the header metadata of an artifact: no clock, no path, nothing that another machine would write differently."""
    sources = [name for name in plan.ancestors(step.name) if name in plan.sources]
    lineage = _canonical(_lineage(plan, step, described, facts))
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": step.title,
        "modelspec.merged_from": ", ".join(sources),
        "sdbuild.key": described[step.name].key,
        "sdbuild.lineage": lineage if len(lineage) <= MAX_CLAIM else _canonical({"lineage": 1, "omitted": blake3_hex(lineage.encode())}),
    }
    if plan.architecture.modelspec:
        metadata |= {
            "modelspec.architecture": plan.architecture.modelspec,
            "modelspec.implementation": "sgm",
            "modelspec.resolution": plan.architecture.resolution,
        }
    metadata |= {f"modelspec.{field}": text for field, text in step.about.items()}
    if rehearsal:
        return metadata | {"sdbuild.rehearsal": rehearsal}
    return metadata | {
        "sd_merge_recipe": _canonical(_webui_recipe(plan, step)),
        "sd_merge_models": _canonical(_webui_models(plan, sources, facts)),
    }


def claimed_ancestors(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read the ancestors a file's own metadata names, by sha256; what is not of AUTOMATIC1111's form is passed over.

    Nobody has verified these: they are the word of whoever made the file.
    """
    text = metadata.get("sd_merge_models", "")
    try:
        table = json.loads(text) if len(text) <= MAX_CLAIM else {}
    except (ValueError, RecursionError):
        table = {}
    if not isinstance(table, dict):
        return {}
    claims = {
        sha256.lower(): {"name": _encodable(entry["name"]), "legacy_hash": entry.get("legacy_hash"), "sd_merge_recipe": entry.get("sd_merge_recipe")}
        for sha256, entry in sorted(table.items())
        if _is_sha256(sha256) and isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    return dict(list(claims.items())[:MAX_CLAIMS])


def shares_of(plan: Plan, step: Step, checked: Checked) -> dict[str, Share] | None:
    """Return each source's share in an artifact, through all steps between; None when a method on the way is not linear.

    Constants and whole numbers, which are never averaged, do not count.
    """
    tensors: dict[str, dict[str, Blend]] = {}
    for name in plan.ancestors(step.name):
        if name in plan.sources:
            whole = Blend({name: 1.0})
            tensors[name] = dict.fromkeys(checked.tensors[name], whole)
            continue
        tensors[name] = {}
        inputs = plan.steps[name].inputs
        for tensor, operation in checked.operations[name].items():
            if operation.blend is None:
                return None
            parts = [tensors[inputs[n]][tensor] * operation.blend[n] for n in operation.reads]
            tensors[name][tensor] = sum(parts[1:], parts[0])
    sizes = {t: spec.numel for t, spec in checked.tensors[step.name].items() if _is_averaged(plan, t, spec.dtype)}
    total = sum(sizes.values())
    shares = {}
    for source in (n for n in plan.ancestors(step.name) if n in plan.sources):
        per_tensor = {t: tensors[step.name][t][source] for t in sizes}
        mean = math.fsum(share * sizes[t] for t, share in per_tensor.items()) / total if total else 0.0
        shares[source] = Share(
            mean=_rounded(mean),
            least=_rounded(min(per_tensor.values(), default=0.0)),
            most=_rounded(max(per_tensor.values(), default=0.0)),
        )
    return shares


def _is_averaged(plan: Plan, tensor: str, dtype: str) -> bool:
    return dtype in {"F64", "F32", "F16", "BF16"} and not plan.architecture.is_constant(tensor)


def _rounded(share: float) -> float:
    """Drop the noise of binary fractions, so that 0.30000000000000004 reads 0.3."""
    return round(share, 9) + 0.0


def _canonical(value: Any) -> str:
    return _encodable(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def _encodable(text: str) -> str:
    """Replace halves of characters, which JSON can spell and no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _lineage(plan: Plan, step: Step, described: Mapping[str, Description], facts: Mapping[str, Facts]) -> dict[str, Any]:
    """Describe the whole ancestry, sources first."""
    names = plan.ancestors(step.name)
    sources = [
        {"name": name, "tensors": described[name].key}
        | _conversion(facts[name])
        | plan.sources[name].model_dump(include={"sha256", "blake3", "uri", "license", "credit", "homepage", "permissions"}, exclude_none=True)
        for name in names
        if name in plan.sources
    ]
    steps = [{"name": name, "facts": dict(described[name].facts), "inputs": dict(described[name].inputs)} for name in names if name in plan.steps]
    return {"lineage": 1, "sources": sources, "steps": steps}


def _conversion(facts: Facts) -> dict[str, Any]:
    """Say what a source was converted from; its own file's sha256 is known then, pinned or not, and names the file that was published."""
    return ({"converted_from": facts.kind} | ({"sha256": facts.sha256} if facts.sha256 else {})) if facts.kind else {}


def _webui_recipe(plan: Plan, step: Step) -> dict[str, Any]:
    """Say the last step as AUTOMATIC1111 would; readers ignore types they do not know, and show the rest."""
    pins = [plan.sources[i].sha256 if i in plan.sources else None for i in step.inputs] + [None] * 3
    facts = {"formula": readable_formula(step)} if step.method.name == "formula" else {}
    alpha = step.params.get("alpha")
    return facts | {
        "type": "sdbuild",
        "custom_name": step.title,
        "interp_method": step.method.name,
        "multiplier": alpha.base if alpha and not alpha.blocks and not alpha.rules else None,
        "primary_model_hash": pins[0],
        "secondary_model_hash": pins[1],
        "tertiary_model_hash": pins[2],
        "save_as_half": step.dtype == "F16",
    }


def readable_formula(step: Step) -> str:
    """Write a step's formula with the names its author used."""
    return relabelled(str(step.params["formula"]), dict(zip(step.roles, step.inputs, strict=True)))


def _webui_models(plan: Plan, sources: list[str], facts: Mapping[str, Facts]) -> dict[str, Any]:
    """List the pinned parents by sha256, after the ancestors they claim in their own metadata."""
    models: dict[str, Any] = {}
    for name in sources:
        models |= claimed_ancestors(facts[name].claims)
    for name in sources:
        if sha256 := plan.sources[name].sha256:
            recipe = facts[name].claims.get("sd_merge_recipe")
            models[sha256.lower()] = {"name": name, "legacy_hash": None, "sd_merge_recipe": recipe if recipe and len(recipe) <= MAX_CLAIM else None}
    return models


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdefABCDEF" for c in text)
