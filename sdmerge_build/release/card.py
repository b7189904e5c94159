"""Owns the model card: README.md as Hugging Face reads it, YAML for the hub and Markdown for people.

Has never heard of files on this machine. Fields: hub-docs `model-cards.md`. Every value of the front matter is a JSON string, which is YAML too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from sdmerge_build.files import readable_size
from sdmerge_build.licences import NAMES, in_words
from sdmerge_build.release.notice import DUTIES, licence_texts
from sdmerge_build.release.reading import (
    PROJECT,
    Manifest,
    ancestor_of,
    author_of,
    hub_license,
    license_ids,
    license_of,
    page,
    release_of,
    repository,
    stem_of,
    terms_of,
    title_of,
)
from sdmerge_build.release.writing import address, code, code_block, link, markdown, one_line

__all__ = ["card", "front_matter"]

MOST_CLAIMED = 100
_TAGS = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
_DUTY_NAMES = {"change-notice": "Change notice", "licence-copy": "Licence copies", "pass-on": "Pass on", "source-offer": "Source"}


def card(manifest: Manifest) -> str:
    """Write README.md."""
    blocks = [front_matter(manifest), f"# {markdown(title_of(manifest))}"]
    for part in (_about, _making, _parents, _terms, _duties, _reproducing):
        blocks += part(manifest)
    return "\n\n".join(blocks) + "\n"


def front_matter(manifest: Manifest) -> str:
    """Write what the hub reads. Where the hub has no id for the licence, the name and the place of its text stand beside `other`."""
    license_id = license_of(manifest)
    hub_id, name = hub_license(license_id)
    fields: dict[str, Any] = {"license": hub_id}
    if name:
        fields |= {"license_name": name, "license_link": _license_link(manifest, license_id)}
    bases = list(dict.fromkeys(filter(None, map(repository, manifest.get("source", [])))))
    architecture = str(manifest["artifact"].get("architecture", ""))
    tags = dict.fromkeys(tag for tag in ("merge", "sdbuild", architecture, _TAGS.get(architecture, "")) if tag)
    fields |= {"base_model": bases} if bases else {}
    fields |= {"base_model_relation": "merge", "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": list(tags)}
    lines = ["---"]
    for key, value in fields.items():
        lines += [f"{key}:", *(f"- {_yaml(item)}" for item in value)] if isinstance(value, list) else [f"{key}: {_yaml(value)}"]
    return "\n".join([*lines, "---"])


def _yaml(text: str) -> str:
    """Write a value that every version of YAML reads as this text: printable characters between double quotes."""
    return json.dumps(one_line(text), ensure_ascii=False)


def _license_link(manifest: Manifest, license_id: str) -> str:
    """Say where the licence is read: its address, else its file in this folder; several are listed in NOTICE."""
    texts = [text for text in licence_texts(manifest) if text.id == license_id]
    return (texts[0].url or f"LICENSES/{texts[0].name}") if len(texts) == 1 else "NOTICE"


def _about(manifest: Manifest) -> Iterator[str]:
    artifact, release = manifest["artifact"], release_of(manifest)
    if artifact.get("rehearsal"):
        yield "**This is a rehearsal: its tensors are stand-ins, and it paints nothing.**"
    if artifact.get("description"):
        yield markdown(artifact["description"])
    names = [source["name"] for source in manifest.get("source", [])]
    by = f" by {markdown(author_of(manifest))}" if author_of(manifest) else ""
    yield f"A merge{by} of {_enumeration(names)}, made with [sdbuild]({PROJECT})."
    facts = {
        "Version": markdown(release.get("version") or ""),
        "File": f"{code(stem_of(manifest) + '.safetensors')}, {readable_size(artifact['size'])}",
        "SHA-256": code(artifact["sha256"]),
        "Model hash": code(artifact.get("model_hash", "")),
        "Architecture": markdown(artifact.get("architecture", "")),
        "Parameters": f"{artifact['parameters']:,} in {artifact['tensors']:,} tensors" if {"parameters", "tensors"} <= {*artifact} else "",
        "Number formats": ", ".join(f"{markdown(dtype)} × {count}" for dtype, count in sorted(artifact.get("dtypes", {}).items())),
    }
    yield "\n".join(f"- {name}: {text}" for name, text in facts.items() if text)


def _enumeration(names: list[str]) -> str:
    shown = [markdown(name) for name in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown) or "nothing"


def _making(manifest: Manifest) -> Iterator[str]:
    yield "## How it was made"
    lines = []
    for step in manifest.get("step", []):
        lines.append(f"- {markdown(step['name'])} = {_how(step)}")
        settings = {key: value for key, value in sorted(step.get("facts", {}).items()) if key.startswith("param.") and key != "param.formula"}
        lines += [f"  - {markdown(key.removeprefix('param.'))}: {code(str(value)[:400])}" for key, value in settings.items()]
    if lines:
        yield "\n".join(lines)
    shares = [f"- {markdown(source['name'])}: {_share(source)}" for source in manifest.get("source", []) if "share" in source]
    if shares:
        yield "Shares in the result:"
        yield "\n".join(shares)


def _how(step: Manifest) -> str:
    """Say how a step was made, its formula in the words of its author."""
    if step.get("formula"):
        return code(step["formula"])
    inputs = ", ".join(f"{markdown(role)} = {markdown(name)}" for role, name in sorted(step.get("inputs", {}).items()))
    return f"{code(step['method'])}" + (f" of {inputs}" if inputs else "")


def _share(source: Manifest) -> str:
    whole = f"{source['share'] * 100:.4g} %"
    if "share_least" not in source:
        return whole
    return f"{whole} on average, from {source['share_least'] * 100:.4g} % to {source['share_most'] * 100:.4g} % of a tensor"


def _parents(manifest: Manifest) -> Iterator[str]:
    yield "## Parents"
    lines = []
    for source in manifest.get("source", []):
        ancestor = ancestor_of(manifest, source["name"])
        lines.append(f"- {link(source['name'], page(source) or ancestor.get('homepage', ''))}")
        credit = source.get("credit") or ancestor.get("credit")
        lines += [f"  - Credit: {markdown(credit)}"] if credit else []
        lines += [f"  - Terms: {_layer(layer)}" for layer in ancestor.get("layer", [])]
        lines += [f"  - {markdown(note)}" for note in ancestor.get("notes", [])]
        lines += [] if ancestor.get("contributes", True) else ["  - Contributes no tensor."]
        digests = {"sha256": source.get("sha256"), "blake3": source.get("blake3"), "tensors": source.get("tensor_digest")}
        lines += [f"  - {name}: {code(digest)}" for name, digest in digests.items() if digest]
    if lines:
        yield "\n".join(lines)
    claimed = manifest.get("claimed", [])
    if claimed:
        yield "The parents' own headers claim these ancestors; nobody has verified them."
        lines = [f"- {markdown(c['name'])}, claimed by {markdown(c['by'])}{_hash(c)}" for c in claimed[:MOST_CLAIMED]]
        yield "\n".join(lines + ([f"- and {len(claimed) - MOST_CLAIMED} more in the manifest"] if len(claimed) > MOST_CLAIMED else []))


def _hash(claimed: Manifest) -> str:
    known = claimed.get("sha256") or claimed.get("short_hash")
    return f": {code(known)}" if known else ""


def _layer(layer: Manifest) -> str:
    title = link(layer.get("title") or layer.get("id") or "unknown", layer.get("url", ""))
    return title + (f", according to {markdown(layer['source'])}" if layer.get("source") else "")


def _terms(manifest: Manifest) -> Iterator[str]:
    terms = terms_of(manifest)
    yield "## Terms"
    if terms.get("share") != "on-terms":
        yield "**The texts that bind this model do not say that it can be shared.**"
    if terms.get("summary"):
        yield markdown(terms["summary"])
    license_id = license_of(manifest)
    if license_id:
        title = f"{markdown(terms['license_title'])}, " if terms.get("license_title") and license_id == terms.get("license") else ""
        yield f"Comes under {title}{' and '.join(code(part) for part in license_ids(license_id))}; see `NOTICE` and `LICENSES/`."
    concluded = [f"- {_component(name)}: {_value(value)}" for name, value in sorted(terms.get("concluded", {}).items())]
    if concluded:
        yield "Concluded over all ancestors, the strictest counting:"
        yield "\n".join(concluded)
    yield from _reasons(terms)
    conflicts = terms.get("conflict", [])
    if conflicts:
        yield "### What the texts do not agree on"
        yield "\n".join(_conflict(conflict) for conflict in conflicts)
    yield f"*{markdown(terms.get('advice') or 'This is what the texts say, not legal advice.')}*"


def _reasons(terms: Manifest) -> Iterator[str]:
    """Quote each clause once, with everything that rests on it."""
    resting: dict[tuple[str, str, str], list[Manifest]] = defaultdict(list)
    for reason in terms.get("reason", []):
        resting[reason.get("clause") or "", reason.get("license") or "unknown", reason.get("url") or ""].append(reason)
    for (clause, licence, url), reasons in resting.items():
        components = ", ".join(dict.fromkeys(_component(reason["component"]) for reason in reasons))
        ancestors = _enumeration(list(dict.fromkeys(reason["ancestor"] for reason in reasons)))
        quote = f"{markdown(clause)}\n> " if clause else ""
        yield f"> {quote}— {components}, from {ancestors}: {link(licence, url)}"


def _component(name: str) -> str:
    return markdown(NAMES.get(name, name.replace("_", " ")))


def _value(value: Any) -> str:
    return "; ".join(markdown(in_words(item)) for item in value) if isinstance(value, list) and value else markdown(in_words(value))


def _conflict(conflict: Manifest) -> str:
    lines = [f"- {markdown(conflict['id'])}, {markdown(conflict['level'])}: {markdown(conflict['what'])}"]
    lines += [f"  - {markdown(text)}" for text in conflict.get("rests_on", [])]
    return "\n".join(lines)


def _duties(manifest: Manifest) -> Iterator[str]:
    duties = terms_of(manifest).get("duty", [])
    if duties:
        yield "## Duties of whoever passes it on"
        order = {kind: n for n, kind in enumerate(DUTIES)}
        lines = []
        for duty in sorted(duties, key=lambda duty: order.get(duty["kind"], len(order))):
            kind = markdown(_DUTY_NAMES.get(duty["kind"], str(duty["kind"]).capitalize()))
            through = _enumeration(duty.get("ancestors", [])) if duty.get("ancestors") else ""
            text = f" ({link('text', duty['url'])})" if address(duty.get("url", "")) else ""
            lines.append(f"- {kind}: {markdown(duty['what'])}" + (f", because of {through}" if through else "") + text)
        yield "\n".join(lines)


def _reproducing(manifest: Manifest) -> Iterator[str]:
    reproduce = manifest.get("reproduce", {})
    yield "## Reproduce it"
    if reproduce.get("command"):
        yield code_block(reproduce["command"])
    recipes = {reproduce.get("recipe"): reproduce.get("recipe_digest")} | reproduce.get("recipes", {})
    lines = [f"- recipe {code(name)}, blake3 {code(digest)}" for name, digest in recipes.items() if name and digest]
    lines += [f"- {markdown(name)} {markdown(version)}" for name, version in sorted(reproduce.get("versions", {}).items())]
    artifact = manifest["artifact"]
    lines += [f"- {name} {code(artifact[key])}" for name, key in {"tensors": "tensor_digest", "key": "key"}.items() if artifact.get(key)]
    if lines:
        yield "\n".join(lines)
    yield f"The same recipe and the same parents give the same bytes. The whole lineage is in {code(stem_of(manifest) + '.manifest.toml')}."
