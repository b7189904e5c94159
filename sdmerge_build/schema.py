"""Owns the JSON Schema of recipes, from which editors complete and check: made of the same models and signatures that read them.

Has never heard of any particular recipe. `python -m sdmerge_build.schema` writes `recipe.schema.json`; a test keeps it current.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdmerge_build.architectures import ARCHITECTURES
from sdmerge_build.methods import methods
from sdmerge_build.recipe import RecipeTable

__all__ = ["SCHEMA_FILE", "recipe_schema", "schema_text"]

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")

_NUMBERS = {"type": "object", "additionalProperties": {"type": "number"}}
_RULE = {
    "type": "object",
    "properties": {"match": {"type": "string"}, "value": {"type": "number"}},
    "required": ["match", "value"],
    "additionalProperties": False,
}
_RATIO = {
    "anyOf": [
        {"type": "number"},
        {"type": "string", "pattern": r"^\{[^{}]+\}$", "description": "An axis of `matrix`."},
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "base": {"type": "number", "description": "The value of everything that no block or rule names."},
                "mbw": {"type": "string", "description": "A value per block, between commas, BASE first."},
                "blocks": _NUMBERS | {"description": "Values of blocks: names, ranges such as IN05-IN08, globs."},
                "rules": {"type": "array", "items": _RULE, "description": "Values of tensors, by glob; the last match wins."},
            },
        },
    ]
}
_NAME = {"type": "string", "description": "The name of a source or step."}
_KINDS: dict[str, dict[str, Any]] = {
    "Ratio": _RATIO,
    "list[Ratio]": {"type": "array", "items": _RATIO},
    "Selection": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
}


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe file."""
    schema = RecipeTable.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "sdbuild recipe"
    schema["properties"]["architecture"]["enum"] = list(ARCHITECTURES)
    step = schema["$defs"]["StepTable"]
    step["additionalProperties"] = False
    fields = step["properties"]
    fields["method"]["anyOf"][0]["enum"] = list(methods())
    axis = {"type": "array", "minItems": 1, "items": {"type": ["number", "string"]}}
    fields["matrix"] = {"type": "object", "minProperties": 1, "additionalProperties": axis, "description": "One step per combination of values."}
    for method in methods().values():
        for model in method.models:
            fields[model] = _NAME
        if not method.models:
            fields["models"] = {"type": "array", "items": _NAME}
        for parameter in method.parameters.values():
            fields[parameter.name] = _KINDS[parameter.kind]
    return schema


def schema_text() -> str:
    """Return the schema as it is written to `recipe.schema.json`."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
