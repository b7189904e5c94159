"""Owns what adapters are: from the names and shapes of a file's tensors to what it does to which tensor of a model.

Has never heard of torch, recipes or strengths; what a change does to numbers is for `methods` to know.
"""

from __future__ import annotations

from sdmerge_build.adapters.changes import TAKEN, Adapter, Change, misfit
from sdmerge_build.adapters.reading import is_adapter, read_adapter, recognise_adapter
from sdmerge_build.adapters.settings import SETTINGS, Settings, SettingsError, read_settings, scale_of

__all__ = [
    "SETTINGS",
    "TAKEN",
    "Adapter",
    "Change",
    "Settings",
    "SettingsError",
    "is_adapter",
    "misfit",
    "read_adapter",
    "read_settings",
    "recognise_adapter",
    "scale_of",
]
