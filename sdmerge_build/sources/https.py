"""Owns plain `https:` addresses: the address is all that is known of a file before it is asked for.

Has never heard of hubs.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from sdmerge_build.recipe import SourceTable
from sdmerge_build.sources.offers import Offer
from sdmerge_build.sources.uri import HttpsAddress
from sdmerge_build.sources.web import Web

__all__ = ["Https"]


class Https:
    """Files at addresses of their own."""

    home = ""

    def offer(self, web: Web, base: str, address: HttpsAddress, source: SourceTable, *, with_terms: bool) -> Offer:  # noqa: ARG002
        """Offer what lies at the address; nobody says what that is."""
        return Offer(address=address.url, filename=unquote(urlsplit(address.url).path.rpartition("/")[2]), page=address.url)
