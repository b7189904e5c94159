"""Owns sources: where each one's bytes are, on this machine or elsewhere, and the proof that they are the ones that are meant.

Has never heard of steps or merging. `search` looks on this machine, `remote` asks elsewhere, `stock` keeps what came from there.
"""

from __future__ import annotations

from sdmerge_build.sources.memo import Memo
from sdmerge_build.sources.search import Found, Search, Wanted, find_sources
from sdmerge_build.sources.stock import Stock
from sdmerge_build.sources.uri import UriError, page_of

__all__ = ["Found", "Memo", "Search", "Stock", "UriError", "Wanted", "find_sources", "page_of"]
