"""Owns releases: an artifact, its lineage and everything its parents' terms ask for, in one folder that can be uploaded as it is.

Has never heard of recipes, plans or tensors: every document is computed from the manifest alone.
"""

from __future__ import annotations

from sdmerge_build.release.folder import documents, refuse_foreign, write_release
from sdmerge_build.release.signing import refuse_unsigned, sign

__all__ = ["documents", "refuse_foreign", "refuse_unsigned", "sign", "write_release"]
