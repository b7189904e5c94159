"""Owns the JSON Schema of recipes, from which editors complete and check: made of the same models and signatures that read them.

Has never heard of any particular recipe. `python -m sdmerge_build.schema` writes `recipe.schema.json`; a test keeps it current.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdmerge_build.architectures import ARCHITECTURES, architecture_named, architecture_names
from sdmerge_build.methods import Parameter, methods
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
_NUMBER = {"type": ["number", "string"]}  # text is an axis of `matrix`
_BETWEEN = {
    "type": "object",
    "properties": {"from": {"type": "string"}, "to": {"type": "string"}, "at": _NUMBER},
    "required": ["from", "to", "at"],
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
                "mbw": {
                    "anyOf": [{"type": "string"}, {"type": "array", "items": _NUMBER}],
                    "description": "A value per block, in the order of one of the architecture's lists.",
                },
                "preset": {"anyOf": [{"type": "string"}, _BETWEEN], "description": "Block weights by name, or a mixture of two."},
                "curve": {
                    "type": "array",
                    "items": _NUMBER,
                    "minItems": 1,
                    "maxItems": 100,
                    "description": "Values over depth, with straight lines between.",
                },
                "elemental": {"type": "string", "description": "supermerger's BLOCKS:ELEMENTS:RATIO, between commas or lines."},
                "map": {"type": "string", "description": "Whose count of blocks holds, such as sd-mecha@1."},
                "blocks": _NUMBERS | {"description": "Values of blocks: names, ranges such as IN05-IN08, globs."},
                "rules": {"type": "array", "items": _RULE, "description": "Values of tensors, by glob; the last match wins."},
            },
        },
    ]
}
_NAME = {"type": "string", "description": "The name of a source or step."}
_COMPONENT = {"type": "string", "description": "The source or step that this component is taken from."}
_KINDS: dict[str, dict[str, Any]] = {
    "Selection": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "Seed": {"type": "integer", "minimum": 0},
}


def _kind(parameter: Parameter) -> dict[str, Any]:
    if parameter.words:
        return {"enum": list(parameter.words)}
    if parameter.ratio:
        ratio = {"$ref": "#/$defs/Ratio"}
        return {"anyOf": [ratio, {"type": "array", "items": ratio}]} if parameter.is_list else ratio
    return _KINDS[parameter.kind]


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe file."""
    schema = RecipeTable.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "sdbuild recipe"
    schema["properties"]["architecture"]["enum"] = architecture_names()
    entries = schema["properties"]["methods"]
    entries["items"] = {"anyOf": [{"type": "string"}, entries["items"]]}
    schema["$defs"]["Ratio"] = _RATIO
    fields = schema["$defs"]["StepTable"]["properties"]
    axis = {"type": "array", "minItems": 1, "items": {"type": ["number", "string"]}}
    fields["matrix"] = {"type": "object", "minProperties": 1, "additionalProperties": axis, "description": "One step per combination of values."}
    for method in methods().values():
        kinds = dict.fromkeys(method.models, _NAME) | {parameter.name: _kind(parameter) for parameter in method.parameters.values()}
        if method.is_open:
            kinds[method.rest] = {"type": "array", "items": _NAME}
        for name, kind in kinds.items():
            known = fields.setdefault(name, {"anyOf": []})["anyOf"]
            if kind not in known:
                known.append(kind)
    for component in dict.fromkeys(component for name in ARCHITECTURES for component in architecture_named(name).components):
        known = fields.setdefault(component, {"anyOf": []})["anyOf"]
        known += [kind for kind in [_COMPONENT] if kind not in known]
    built_in = {"properties": {"method": {"enum": list(methods())}}, "propertyNames": {"enum": list(fields)}}
    schema["if"] = {"required": ["methods"]}  # methods of one's own have names and fields that nobody else knows
    schema["else"] = {"properties": {"step": {"additionalProperties": built_in}}}
    return schema


def schema_text() -> str:
    """Return the schema as it is written to `recipe.schema.json`."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
