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

__all__ = ["SETTINGS", "Settings", "SettingsError", "read_settings", "scale_of"]

SETTINGS = "lora_adapter_metadata"
MAX_TEXT = 1 << 20  # a hundred times what a large adapter has

_FACTOR = re.compile(r"(.+?)\.(?:lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down)(?:\.default)?\.(?:weight|bias)")
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
    if not isinstance(settings, dict) or any(isinstance(value, dict) and not key.endswith("_pattern") for key, value in settings.items()):
        message = f"its `{SETTINGS}` is not a JSON object of settings"
        raise SettingsError(message)
    return settings


def scale_of(change: Change, settings: Settings, actual: int) -> float:
    """Return alpha over rank, or over its root, as the settings say; 1 where they say nothing, or the file has an alpha of its own.

    Raises `SettingsError` for what is no number, another rank than the `actual` one, and patterns that are more than names.
    """
    found = _FACTOR.fullmatch(change.factors.get("down") or change.factors.get("diff", ""))
    if not found or "alpha" in change.factors:
        return 1.0
    component, _, module = found[1].partition(".")
    if f"{component}.lora_alpha" not in settings:
        component, module = "", found[1]
    said = {key.removeprefix(f"{component}."): value for key, value in settings.items() if not component or key.startswith(f"{component}.")}
    if "lora_alpha" not in said:
        if settings:
            message = f"its `{SETTINGS}` says nothing of `{found[1]}`"
            raise SettingsError(message)
        return 1.0
    alpha = _number(_matched(said.get("alpha_pattern"), module, said["lora_alpha"]), "lora_alpha")
    rank = _number(_matched(said.get("rank_pattern"), module, said.get("r")), "r")
    if actual not in {0, rank} or not isinstance(said.get("use_rslora", False), bool):
        message = f"its `{SETTINGS}` does not fit its tensors: `r` is {rank:g} where the rank is {actual}"
        raise SettingsError(message if actual not in {0, rank} else f"its `{SETTINGS}` has a `use_rslora` that is neither true nor false")
    if said.get("use_dora") is True and change.kind == "lora" and "dora_scale" not in change.factors:
        message = f"its `{SETTINGS}` says `use_dora`, and it has no magnitudes"
        raise SettingsError(message)
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-6 <= value <= 1e6:
        message = f"its `{SETTINGS}` has no number that makes sense for `{name}`"
        raise SettingsError(message)
    return float(value)
