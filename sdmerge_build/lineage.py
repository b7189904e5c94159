"""Owns what an artifact says of its origin: the metadata of its header, the shares of its sources.

Has never heard of the store or the clock; the same plan and sources always yield the same text.
Formats: ModelSpec 1.0.1 (Stability AI), `sd_merge_recipe` and `sd_merge_models` (AUTOMATIC1111 `modules/extras.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdmerge_build.ancestry import declared_license, handed_on
from sdmerge_build.blend import Blend
from sdmerge_build.check import Checked
from sdmerge_build.claims import MAX_CLAIM, encodable, webui_models
from sdmerge_build.digest import blake3_hex
from sdmerge_build.facts import Facts
from sdmerge_build.formula import relabelled
from sdmerge_build.keys import Description
from sdmerge_build.licences import Conclusion
from sdmerge_build.plan import Plan, Step
from sdmerge_build.weights.ratio import Ratio

__all__ = ["Share", "metadata_of", "readable_formula", "shares_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A source's part in an artifact: the mean over all averaged elements, and its extremes over tensors."""

    mean: float
    least: float
    most: float


def metadata_of(
    plan: Plan, step: Step, described: Mapping[str, Description], facts: Mapping[str, Facts], terms: Conclusion, rehearsal: str
) -> dict[str, str]:
    """Compose the header metadata of an artifact: no clock, no path, nothing that another machine would write differently.

    How much of the ancestry is embedded is for the recipe's `[release]` to say; without one, all of it.
    """
    release = plan.recipe.table.release
    extent = release.lineage if release else "full"
    sources = [name for name in plan.ancestors(step.name) if name in plan.sources]
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": step.title,
        "sdbuild.key": described[step.name].key,
        "sdbuild.lineage": _embedded(_lineage(plan, step, described, facts, terms), extent),
    }
    if extent != "none":
        metadata["modelspec.merged_from"] = ", ".join(sources)
    if plan.architecture.modelspec:
        metadata |= {
            "modelspec.architecture": plan.architecture.modelspec,
            "modelspec.implementation": "sgm",
            "modelspec.resolution": plan.architecture.resolution,
        }
    said = {"author": release.author or "" if release else "", "license": declared_license(plan, step) or _concluded_license(terms)}
    metadata |= {f"modelspec.{field}": text for field, text in (said | dict(step.about)).items() if text}
    if rehearsal:
        return metadata | {"sdbuild.rehearsal": rehearsal}
    if extent != "full":
        return metadata
    return metadata | {
        "sd_merge_recipe": _canonical(_webui_recipe(plan, step)),
        "sd_merge_models": _canonical(_webui_models(plan, sources, facts)),
    }


def shares_of(plan: Plan, step: Step, checked: Checked) -> dict[str, Share] | None:
    """Return each source's share in an artifact, through all steps between; None when a method on the way is not linear.

    Constants and whole numbers, which are never averaged, do not count.
    """
    if any(name in checked.adapters for name in plan.ancestors(step.name)):  # which have strengths, and no share of the whole
        return None
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
            of = operation.moved.names[0] if operation.moved and operation.moved.names else tensor
            parts = [tensors[inputs[n]][of] * operation.blend[n] for n in operation.reads]
            tensors[name][tensor] = sum(parts, Blend({}))
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
    return encodable(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def _concluded_license(terms: Conclusion) -> str:
    """Name the licence that an artifact comes under, where the texts allow a conclusion that it can be shared on."""
    return terms.license_title if terms.share != "no" else ""


def _embedded(lineage: Mapping[str, Any], extent: str) -> str:
    """Write as much of a lineage as is to be known from the file: all, the parents' terms, or no more than that there is one."""
    whole = _canonical(lineage)
    if extent == "licences":
        terms = ("name", "status", "license", "permissions", "evidence", "credit", "homepage")
        sources = [{key: source[key] for key in terms if key in source} for source in lineage["sources"]]
        lineage = {"lineage": 1, "sources": sources, "terms": lineage["terms"]}
    elif extent == "none":
        lineage = {"lineage": 1, "omitted": blake3_hex(whole.encode())}
    text = _canonical(lineage)
    return text if len(text) <= MAX_CLAIM else _canonical({"lineage": 1, "omitted": blake3_hex(whole.encode())})


def _lineage(plan: Plan, step: Step, described: Mapping[str, Description], facts: Mapping[str, Facts], terms: Conclusion) -> dict[str, Any]:
    """Describe the whole ancestry, sources first, and how far the terms of each are known; what is said of one twice has two rows."""
    names = plan.ancestors(step.name)
    sources = []
    for name in (name for name in names if name in plan.sources):
        bytes_of = {"tensors": facts[name].tensors} | _conversion(facts[name])
        bytes_of |= plan.sources[name].model_dump(include={"sha256", "blake3", "uri"}, exclude_none=True)
        first, *others = handed_on(plan, name, facts[name])
        sources += [first | bytes_of, *others]
    steps = [{"name": name, "facts": dict(described[name].facts), "inputs": dict(described[name].inputs)} for name in names if name in plan.steps]
    return {"lineage": 1, "sources": sources, "steps": steps, "terms": {"license": terms.license, "share": terms.share}}


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
        "multiplier": alpha.base if isinstance(alpha, Ratio) and alpha.is_number else None,
        "primary_model_hash": pins[0],
        "secondary_model_hash": pins[1],
        "tertiary_model_hash": pins[2],
        "save_as_half": str(step.dtype) == "F16",
    }


def readable_formula(step: Step) -> str:
    """Write a step's formula with the names its author used."""
    return relabelled(str(step.params["formula"]), dict(zip(step.roles, step.inputs, strict=True)))


def _webui_models(plan: Plan, sources: list[str], facts: Mapping[str, Facts]) -> dict[str, Any]:
    """List the pinned parents by sha256, after the ancestors they claim in their own metadata."""
    models: dict[str, Any] = {}
    for name in sources:
        models |= webui_models(facts[name].claims)
    for name in sources:
        if sha256 := plan.sources[name].sha256:
            recipe = facts[name].claims.get("sd_merge_recipe")
            models[sha256.lower()] = {"name": name, "legacy_hash": None, "sd_merge_recipe": recipe if recipe and len(recipe) <= MAX_CLAIM else None}
    return models
