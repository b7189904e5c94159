"""Owns the addresses that sources come from: reads them, and names the page a person would open.

Has never heard of the network; downloading is somebody else's work.
Forms: `https:`, `civitai:MODEL@VERSION[#FILE]`, AIR urns, `hf:OWNER/REPO/FILE@REVISION`, `recipe:OTHER.toml#STEP`.
"""

from __future__ import annotations

import re

__all__ = ["UriError", "page_of"]


class UriError(ValueError):
    """An address cannot be read."""


_HTTPS = re.compile(r"https://[^\s/]+\S*")
_CIVITAI = re.compile(r"civitai:(?P<model>\d+)@(?P<version>\d+)(?:#\d+)?")
_AIR = re.compile(
    r"(?:urn:)?(?:air:)?[a-z0-9]+:[a-z0-9]+:(?P<hub>civitai|huggingface):(?P<model>[^@\s+]+)@(?P<version>[^\s+]+)(?:\+\d+)?", re.IGNORECASE
)
_HF = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^@\s]+)@(?P<revision>\S+)")
_RECIPE = re.compile(r"recipe:(?P<file>[^#\s]+\.toml)#(?P<step>\S+)")


def page_of(uri: str) -> str:
    """Name the page of an address, for a message; a recipe's address is its own page. Raises `UriError`."""
    if _HTTPS.fullmatch(uri) or _RECIPE.fullmatch(uri):
        return uri
    if match := _CIVITAI.fullmatch(uri):
        return f"https://civitai.com/models/{match['model']}?modelVersionId={match['version']}"
    if match := _HF.fullmatch(uri):
        return f"https://huggingface.co/{match['repo']}/blob/{match['revision']}/{match['file']}"
    if match := _AIR.fullmatch(uri):
        if match["hub"].casefold() == "civitai":
            return f"https://civitai.com/models/{match['model']}?modelVersionId={match['version']}"
        return f"https://huggingface.co/{match['model']}/tree/{match['version']}"
    message = f"`{uri[:200]}` is not an address sdbuild knows"
    raise UriError(message)
