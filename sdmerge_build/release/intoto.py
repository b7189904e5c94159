"""Owns the provenance statement: in-toto Statement v1 with the predicate of SLSA provenance v1, as one line of JSON.

Has never heard of the clock or of signatures: what is stated here is the word of whoever made the file, until somebody signs it.
Formats: https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sdmerge_build.digest import is_hex
from sdmerge_build.release.reading import PROJECT, Manifest, ancestor_of, stem_of
from sdmerge_build.release.writing import canonical

__all__ = ["BUILD_TYPE", "provenance"]

BUILD_TYPE = f"{PROJECT}/buildtypes/merge/v1"
BUILDER = f"{PROJECT}/builders/local/v1"
_NUMERICS = ("architecture", "dtypes", "key", "tensor_digest")
_URI = re.compile(r"[a-z][a-z0-9+.-]*:[!-~]+")  # hub addresses are URIs of their own schemes


def provenance(manifest: Manifest) -> str:
    """Write the statement: what was made, by which recipe, of which files; sorted, with a line end."""
    artifact, reproduce = manifest["artifact"], manifest.get("reproduce", {})
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "recipe": reproduce.get("recipe", ""),
                "target": artifact["name"],
                **({"rehearsal": artifact["rehearsal"]} if artifact.get("rehearsal") else {}),
            },
            "internalParameters": {key: artifact[key] for key in _NUMERICS if key in artifact},
            "resolvedDependencies": [*_recipes(reproduce), *(_source(manifest, source) for source in manifest.get("source", []))],
        },
        "runDetails": {"builder": {"id": BUILDER, "version": dict(reproduce.get("versions", {}))}},
    }
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": f"{stem_of(manifest)}.safetensors", "digest": {"sha256": artifact["sha256"]}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": predicate,
    }
    return canonical(statement) + "\n"


def _recipes(reproduce: Manifest) -> Iterator[dict[str, Any]]:
    recipes = {reproduce.get("recipe"): reproduce.get("recipe_digest")} | dict(reproduce.get("recipes", {}))
    for name, digest in recipes.items():
        if name and digest:
            yield {"name": name, "digest": {"blake3": digest}, "mediaType": "application/toml"}


def _source(manifest: Manifest, source: Manifest) -> dict[str, Any]:
    """Describe a parent. Where no digest of its file was pinned, the digest of its tensors stands in, under a name of ours."""
    ancestor = ancestor_of(manifest, source["name"])
    digest = {name: source[name] for name in ("sha256", "blake3") if is_hex(source.get(name))}
    annotations = {
        "tensorDigest": source.get("tensor_digest"),
        "license": ancestor.get("license") or source.get("license"),
        "licenseStatus": ancestor.get("status"),
        "convertedFrom": source.get("converted_from"),
    }
    return {
        "name": source["name"],
        "digest": digest or {"sdbuildTensorsV1": source["tensor_digest"]},
        "annotations": {key: value for key, value in annotations.items() if value},
        **({"uri": source["uri"]} if _URI.fullmatch(source.get("uri", "")) else {}),
    }
