"""Owns what several commands say alike: where finished work is kept, which folders hold models, how far to go for a source.

Has never heard of what the commands do with it.
"""

from __future__ import annotations

import os
from pathlib import Path

from sdmerge_build.errors import Issue, RecipeError
from sdmerge_build.supply import Reach

__all__ = ["reach_from", "store_from"]


def store_from(said: Path | None) -> Path:
    """Return the store that the command line or the environment names."""
    return said or Path(os.environ.get("SDBUILD_STORE") or "cache")


def reach_from(
    *, models: tuple[Path, ...], jobs: int | None, locked: bool = False, offline: bool = False, allow_private: bool = False, searches: bool = True
) -> Reach:
    """Put together how far to go for sources. Raises `RecipeError` when a folder of models is not there."""
    owned = [Path(os.path.expanduser(folder)) for folder in os.environ.get("SDBUILD_MODELS", "").split(os.pathsep) if folder]  # noqa: PTH111  raises nothing
    folders = (*models, *owned) if searches else ()
    if missing := [folder for folder in folders if not folder.is_dir()]:
        hint = "SDBUILD_MODELS names it" if missing[0] not in models else ""
        raise RecipeError(*(Issue(where=str(folder), what="there is no such folder of models", hint=hint) for folder in missing))
    return Reach(folders=folders, jobs=jobs or os.cpu_count() or 1, locked=locked, offline=offline, allow_private=allow_private)
