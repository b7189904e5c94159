"""Owns late loading: torch as files of methods see it, loaded when the first of them computes.

Has never heard of any method. Plans and keys need the signatures of methods, and a build with nothing to do must not wait seconds for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["torch"]


class _Late:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self._name)
        self.__dict__.update(vars(module))  # from now on as quick as the module itself
        return getattr(module, attribute)


torch = _Late("torch")
