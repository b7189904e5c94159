"""Owns whom we talk to over the network and what we show them: tokens, private addresses, redirects.

Has never heard of models, nor of how a request is sent. A token is shown to its own host, over TLS or loopback, and to nobody else.
"""

from __future__ import annotations

import base64
import ipaddress
import netrc
import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sdmerge_build.files import read_regular

__all__ = ["GoneError", "Key", "PastEnd", "Trust", "Unsteady", "WebError", "host_of", "origin_of", "proxy_of"]


MOST_NETRC = 1 << 20  # bytes


class WebError(Exception):
    """An answer that no second try would change; says what, and what to do."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class GoneError(WebError):
    """There is no such file there, or not any more."""


class Unsteady(WebError):  # noqa: N818  it is not yet an error
    """A failure that may pass: a lost connection, a busy server, a link that has expired."""

    def __init__(self, what: str, delay: float | None = None, tries: int = 6) -> None:
        super().__init__(what, "run again later; what has arrived is kept, and --offline asks nobody")
        self.delay = delay  # seconds to wait, where the server says
        self.tries = tries  # in a row, before it is given up


class PastEnd(Unsteady):
    """More was asked for than the file has: it is not the file it was, or was complete already."""


@dataclass(frozen=True, slots=True)
class Key:
    """What opens a host: the value of its `Authorization` header, never shown, and the name people know it by."""

    name: str
    value: str = field(default="", repr=False)


def host_of(url: str) -> str:
    """Name the host of an address, for messages."""
    return urlsplit(url).hostname or ""


def origin_of(url: str) -> str:
    """Name the scheme, host and port of an address: to whom a key is shown."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


class Trust:
    """The rules of one run.

    `hubs` gives for each variable that may hold a token the base address of its hub. Who runs us chose these addresses, so they may be
    private or without TLS; nobody else's may, unless `allow_private`.
    """

    def __init__(self, hubs: Mapping[str, str], *, allow_private: bool) -> None:
        self._variables: dict[str, list[str]] = {}
        for variable, url in hubs.items():
            self._variables.setdefault(origin_of(url), []).append(variable)
        self._allow_private = allow_private

    def key_of(self, url: str) -> Key:
        """Return what opens an address: a token, or an entry of netrc; without a value when there is none. Raises `WebError`."""
        origin, host = origin_of(url), host_of(url)
        if variables := self._variables.get(origin):
            variable = next((name for name in variables if os.environ.get(name, "").strip()), variables[0])
            token = os.environ.get(variable, "").strip() or _from_netrc(host)[1]
            if token and not re.fullmatch(r"[!-~]+", token):
                raise WebError(f"{variable} holds characters that no token has")
            key = Key(variable, f"Bearer {token}" if token else "")
        else:
            login, password = _from_netrc(host)
            secret = base64.b64encode(f"{login}:{password}".encode()).decode()
            key = Key(f"an entry for {host} in netrc", f"Basic {secret}" if login or password else "")
        return key if _is_safe(url) else Key(key.name)  # on its way it could be read

    def advice(self, url: str) -> str:
        """Say which token to set, or that the one that is set does not help."""
        key = self.key_of(url)
        if key.value:
            return f"{key.name} was sent, and does not open this file: has it expired, and were the terms on the model's page accepted?"
        if not _is_safe(url):
            return f"{host_of(url)} is asked without TLS, so no token is sent to it"
        return f"if it needs an account, set {key.name}"

    def vet(self, url: str) -> None:
        """Refuse private addresses: a recipe, or a server, must not make us ask machines that only we can reach. Raises `WebError`."""
        if self._is_free(url):
            return
        parts = urlsplit(url)
        host = parts.hostname or ""
        if proxy_of(url) and not _is_address(host):
            return  # whom the proxy reaches is its owner's business
        try:
            found = socket.getaddrinfo(host.rstrip("."), parts.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Unsteady(f"there is no host `{host[:100]}`, or no network", tries=1) from None
        for *_, address in found:
            _refuse_private(host, str(address[0]))

    def vet_peer(self, url: str, peer: str) -> None:
        """Look at whom we really reached: a name may have been looked up anew meanwhile."""
        if not self._is_free(url) and not proxy_of(url):
            _refuse_private(host_of(url), peer)

    def vet_redirect(self, here: str, there: str) -> None:
        """Refuse to be sent away from TLS, or from HTTP altogether."""
        scheme = urlsplit(there).scheme
        if scheme not in {"https", "http"}:
            raise WebError(f"{host_of(here)} redirects to `{scheme[:20]}:`, which is not followed")
        if scheme == "http" and urlsplit(here).scheme == "https":
            raise WebError(f"{host_of(here)} redirects to an address without encryption, which is not followed")

    def _is_free(self, url: str) -> bool:
        return self._allow_private or origin_of(url) in self._variables


def _refuse_private(host: str, text: str) -> None:
    address = ipaddress.ip_address(text.partition("%")[0])
    real = address
    if isinstance(address, ipaddress.IPv6Address):  # some stand for addresses of the older kind
        older = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if int(address) >> 32 in {0, 0x64FF9B << 64} else None
        real = address.ipv4_mapped or address.sixtofour or older or address
    if not real.is_global or real.is_multicast or getattr(real, "is_site_local", False):
        raise WebError(f"{host} is a private address ({address}), which is not asked", "if that is meant, say --allow-private")


def _is_safe(url: str) -> bool:
    """Tell whether nobody on the way can read what is sent."""
    return origin_of(url).startswith("https:") or (_is_loopback(host_of(url)) and not proxy_of(url))


def _is_address(host: str) -> bool:
    """Tell whether a host is an address in any spelling that systems know, such as `127.1`, or a name of this machine."""
    plain = host.rstrip(".").lower()
    try:
        ipaddress.ip_address(plain)
    except ValueError:
        try:
            socket.inet_aton(plain)
        except OSError:
            return plain == "localhost" or plain.endswith(".localhost")
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_of(url: str) -> str:
    """Name the proxy that the environment wants an address to be asked through; nothing where it is asked directly."""
    proxies = {name.lower(): proxy for name, proxy in urllib.request.getproxies().items()}
    parts = urlsplit(url)
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    is_free = any(urllib.request.proxy_bypass(host) for host in (host_of(url), f"{host_of(url)}:{port}")) if proxy else False
    return "" if is_free else proxy


def _from_netrc(host: str) -> tuple[str, str]:
    """Return login and password of a host's own entry in the file that NETRC names, or in the usual one; a `default` entry is no host's own."""
    try:
        path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        read_regular(path, MOST_NETRC)  # a device or a pipe would be read for ever
        entry = netrc.netrc(path).hosts.get(host)
    except (OSError, netrc.NetrcParseError, RuntimeError, UnicodeError):
        entry = None
    return (entry[0] or "", entry[2] or "") if entry else ("", "")
