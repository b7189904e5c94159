"""Owns what diffusers writes into the header of a LoRA instead of alphas: how strongly each module was trained to be applied.

Has never heard of tensors. Format: `lora_adapter_metadata` of diffusers `loaders/lora_base.py`, the settings of peft's `LoraConfig` per component.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sdmerge_build.adapters.changes import Change

__all__ = ["SETTINGS", "SettingsError", "read_settings", "scale_of"]

SETTINGS = "lora_adapter_metadata"
MAX_TEXT = 1 << 20  # a hundred times what a large adapter has

_FACTOR = re.compile(r"(.+?)\.(?:lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down)(?:\.default)?\.weight")
_PLAIN = re.compile(r"[\w.]+")

Settings = Mapping[str, Any]
"""`unet.r`, `unet.lora_alpha`, `unet.alpha_pattern` and so on."""


class SettingsError(ValueError):
    """The settings of an adapter cannot be understood, so nobody knows how strongly it is to be applied."""


def read_settings(metadata: Mapping[str, str]) -> Settings:
    """Read the settings of a header; nothing where it has none. Raises `SettingsError`."""
    text = metadata.get(SETTINGS, "{}")
    try:
        settings = json.loads(text) if len(text) <= MAX_TEXT else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        message = f"its `{SETTINGS}` is not a JSON object"
        raise SettingsError(message)
    return settings


def scale_of(change: Change, settings: Settings) -> float:
    """Return alpha over rank, or over its root, as the settings say; 1 where they say nothing, or the file has an alpha of its own.

    Raises `SettingsError` for what is no number, and for patterns that are more than names.
    """
    found = _FACTOR.fullmatch(change.factors.get("down", ""))
    if not found or "alpha" in change.factors:
        return 1.0
    component, _, module = found[1].partition(".")
    if f"{component}.lora_alpha" not in settings:
        component, module = "", found[1]
    said = {key.removeprefix(f"{component}."): value for key, value in settings.items() if not component or key.startswith(f"{component}.")}
    if "lora_alpha" not in said:
        return 1.0
    alpha = _number(_matched(said.get("alpha_pattern"), module, said["lora_alpha"]), "lora_alpha")
    rank = _number(_matched(said.get("rank_pattern"), module, said.get("r")), "r")
    return alpha / (math.sqrt(rank) if said.get("use_rslora") is True else rank)


def _matched(patterns: Any, module: str, otherwise: Any) -> Any:
    """Find what is said of a module, by its whole name or the end of it."""
    for pattern, value in (patterns or {}).items() if isinstance(patterns, dict | None) else [("", None)]:
        name = pattern.removeprefix("^")
        if not _PLAIN.fullmatch(name):
            message = f"its `{SETTINGS}` has the pattern `{pattern[:80]}`, which is more than the name of a module"
            raise SettingsError(message)
        if module == name or (name == pattern and module.endswith(f".{name}")):
            return value
    return otherwise


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        message = f"its `{SETTINGS}` has no number that makes sense for `{name}`"
        raise SettingsError(message)
    return float(value)
