"""Owns conversations over HTTP: redirects by hand, ranges, patience, and what an answer's status means.

Has never heard of models or hubs. The one module that knows httpx; it is imported only when something must really be asked for.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Self, TypeVar
from urllib.parse import urljoin

import httpx

from sdmerge_build import __version__
from sdmerge_build.sources.body import READ_SECONDS, Body, Flow
from sdmerge_build.sources.trust import GoneError, PastEnd, Trust, Unsteady, WebError, host_of, origin_of, proxy_of
from sdmerge_build.sources.uri import without_secrets

__all__ = ["Web"]

MOST_REDIRECTS = 5
MOST_JSON = 8 << 20  # bytes of an answer that is read into memory
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between tries
LONGEST_DELAY = 120.0  # seconds, whatever a server asks for
HEADER_SECONDS = 60.0  # for all of an answer's headers
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_MOVED = {301, 302, 303, 307, 308}
_DENIED = {401, 403}
_MISSING = {  # Hugging Face's words for it
    "EntryNotFound": "the repository has no such file",
    "RevisionNotFound": "the repository has no such commit, tag or branch",
    "RepoNotFound": "there is no such repository, or it is not for everybody",
}

Result = TypeVar("Result")


class Web:
    """A client that goes by the rules of `trust`, and stops when `stopping` is set."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self.stopping = threading.Event()
        self._clients: dict[str, httpx.Client] = {}

    def json(self, url: str) -> Any:
        """Ask for a small JSON document. Raises `WebError`."""
        try:
            return json.loads(self.whole(url))
        except (ValueError, RecursionError):
            raise WebError(f"{host_of(url)} answers what is not JSON") from None

    def whole(self, url: str) -> bytes:
        """Ask for a small file. Raises `WebError`."""

        def ask() -> bytes:
            with self.stream(url) as body:
                return b"".join(_limited(body.pieces()))

        return self.patiently(ask)

    def head(self, url: str) -> Mapping[str, str]:
        """Ask what a host itself says of a file, without following it elsewhere. Raises `WebError`."""

        def ask() -> Mapping[str, str]:
            with self._answer("HEAD", url, {}, stays=True) as (response, _):
                if response.status_code not in _MOVED:
                    self._check(response, url, has_left=False)
                return response.headers

        return self.patiently(ask)

    def read(self, url: str, start: int, length: int) -> tuple[bytes, int | None]:
        """Read some bytes of a file by a ranged request, and return them with the size of the whole. Raises `WebError`."""

        def ask() -> tuple[bytes, int | None]:
            with self.stream(url, start, length) as body:
                if body.start > start:
                    raise Unsteady(f"{host_of(url)} sends another part than was asked for")
                have = bytearray()
                for chunk in body.pieces():
                    have += chunk
                    if len(have) >= start - body.start + length:
                        break
            data = bytes(have[start - body.start :][:length])
            if not data or (body.total is not None and len(data) < min(length, body.total - start)):
                raise Unsteady(f"{host_of(url)} sends less than was asked for")
            return data, body.total

        return self.patiently(ask)

    @contextlib.contextmanager
    def stream(self, url: str, start: int = 0, length: int | None = None, etag: str = "") -> Iterator[Body]:
        """Ask once for a file from byte `start`; with `etag`, only if it still is the file that had it. A server may answer with all of it."""
        headers = {}
        if start or length is not None:
            headers["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        if start and etag:
            headers["If-Range"] = etag
        with self._answer("GET", url, headers) as (response, has_left):
            if response.status_code == 416 and not start:
                raise WebError(f"{host_of(url)} says that the file is empty")
            self._check(response, url, has_left=has_left)
            yield self._body(response)

    def patiently(self, ask: Callable[[], Result]) -> Result:
        """Try until it works, or has failed too often; wait longer each time, or as long as the server says."""
        for failures, delay in enumerate(DELAYS, 1):
            try:
                return ask()
            except Unsteady as error:
                if failures >= error.tries:
                    raise
                self.wait(error.delay if error.delay is not None else delay)
        return ask()

    def wait(self, seconds: float) -> None:
        """Wait, unless everything is being stopped."""
        if self.stopping.wait(seconds):
            raise WebError("stopped")

    @contextlib.contextmanager
    def _answer(self, method: str, url: str, headers: Mapping[str, str], *, stays: bool = False) -> Iterator[tuple[httpx.Response, bool]]:
        """Ask, follow redirects, and give the last answer and whether it comes from another host than was asked."""
        key, has_left, here = self.trust.key_of(url), False, url
        for _ in range(MOST_REDIRECTS + 1):
            self.trust.vet(here)
            own = {"Authorization": key.value} if key.value and not has_left else {}
            with self._sent(method, here, {**headers, **own}) as response:
                target = response.extensions["location"]
                if response.status_code not in _MOVED or not target:
                    yield response, has_left
                    return
                there = _joined(here, target)
                self.trust.vet_redirect(here, there)
                if origin_of(there) != origin_of(here):
                    if stays:
                        yield response, has_left
                        return
                    has_left = True
            here = there
        raise WebError(f"{host_of(url)} redirects more than {MOST_REDIRECTS} times")

    def _client(self, url: str) -> httpx.Client:
        """Return the client for an address: directly, or through the proxy that the environment names; nobody else decides that."""
        proxy = proxy_of(url)
        if proxy not in self._clients:
            headers = {"User-Agent": f"sdbuild/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*"}
            no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # what a host hands us for our token is shown to nobody either
            try:
                client = httpx.Client(
                    proxy=proxy or None,
                    verify=httpx.create_ssl_context(trust_env=True),
                    trust_env=False,
                    headers=headers,
                    cookies=no_cookies,
                    timeout=httpx.Timeout(15.0, read=READ_SECONDS, pool=None),
                    limits=httpx.Limits(max_keepalive_connections=0),  # a connection of its own for each request, so that each has its deadline
                    event_hooks={"response": [_hide_redirect]},
                )
            except (OSError, ssl.SSLError):
                raise WebError("the certificates that SSL_CERT_FILE or SSL_CERT_DIR name cannot be read") from None
            except (ValueError, ImportError, httpx.InvalidURL):
                raise WebError(
                    "the proxy that the environment names cannot be used", "write http://HOST:PORT into HTTPS_PROXY, or unset it"
                ) from None
            weakref.finalize(self, client.close)
            self._clients[proxy] = client
        return self._clients[proxy]

    @contextlib.contextmanager
    def _sent(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """Send one request; what httpx raises, whose texts may hold addresses that are nobody's business, is said in our words."""
        host = host_of(url)
        try:
            with _Deadline() as deadline, self._client(url).stream(method, url, headers=headers, extensions={"trace": deadline.hear}) as response:
                deadline.cancel()
                stream = response.extensions.get("network_stream")
                if stream and (peer := stream.get_extra_info("server_addr")):
                    self.trust.vet_peer(url, str(peer[0]))
                yield response
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError):
            raise WebError(f"`{without_secrets(url)[:200]}` is not an address that can be opened") from None
        except (httpx.TransportError, httpx.DecodingError, ssl.SSLError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise WebError(f"{host} cannot prove who it is: its certificate is not accepted") from None
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                raise Unsteady(f"no answer from {host}", tries=2) from None
            raise Unsteady(f"the connection to {host} was lost") from None

    def _check(self, response: httpx.Response, url: str, *, has_left: bool) -> None:
        """Raise what an answer's status means."""
        status, host = response.status_code, host_of(url)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if status in {200, 206}:
            if kind in {"text/html", "application/xhtml+xml"}:
                raise WebError(f"{host} answers with a web page instead of the file, as it does to who is not logged in", self.trust.advice(url))
            return
        if status in _BUSY:
            raise Unsteady(f"{host} is busy ({status})", _retry_after(response.headers))
        if status == 416:
            raise PastEnd(f"{host} does not have the rest of the file ({status})")
        if has_left:
            raise Unsteady(f"the link that {host} gave is no longer good ({status})")
        secret = self.trust.key_of(url).value.rpartition(" ")[2]
        said = response.headers.get("x-error-message", "")
        said = (said.replace(secret, "…") if secret else said)[:300]
        reason = f": {said}" if said else ""
        if status in _DENIED:
            raise WebError(f"{host} refuses ({status}){reason}", self.trust.advice(url))
        if status in {404, 410}:
            missing = response.headers.get("x-error-code") or "there is no such file or model"
            raise GoneError(f"{host} answers {status}: {_MISSING.get(missing, missing[:100])}", "it may have been renamed or taken down")
        raise WebError(f"{host} answers {status}{reason}")

    def _body(self, response: httpx.Response) -> Body:
        headers = response.headers
        length = int(said) if (said := headers.get("content-length", "")).isdecimal() and len(said) < 19 else None
        start, total = 0, length
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", headers.get("content-range", "").strip())
            if not match:
                raise Unsteady(f"{host_of(str(response.url))} sends a part without saying which")
            start, total = int(match[1]), int(match[2]) if match[2] != "*" else None
        packing = [name for part in headers.get("content-encoding", "").split(",") if (name := part.strip().lower()) not in {"", "identity"}]
        if len(packing) > 1 or {*packing} - {"gzip", "deflate"}:  # packed twice, a few bytes would fill the memory
            raise WebError(f"{host_of(str(response.url))} sends the file packed in a way that was not asked for ({', '.join(sorted(packing))[:50]})")
        is_packed, etag = bool(packing), headers.get("etag", "")
        if is_packed and start:
            raise PastEnd(f"{host_of(str(response.url))} sends a part of a packed file")
        coding = headers.get("transfer-encoding", "").strip().lower()
        is_direct = length and not (is_packed or coding or proxy_of(str(response.url)).startswith("https"))  # there, TLS lies within TLS
        connection = response.extensions["network_stream"].get_extra_info("socket") if is_direct else None
        return Body(
            start=start,
            total=None if is_packed else total,
            etag=etag if re.fullmatch('"[!#-~]*"', etag) and not is_packed else "",
            is_bounded=(length is not None or coding.endswith("chunked")) and (response.status_code != 206 or total is not None),
            fill=Flow(
                response.iter_bytes() if is_packed else response.iter_raw(), connection, length or 0, self.stopping, host_of(str(response.url))
            ),
        )


def _hide_redirect(response: httpx.Response) -> None:
    """Put where a redirect leads where httpx does not look: it would read it, and say of what it cannot read that the connection was lost."""
    response.extensions["location"] = response.headers.pop("location", "")


class _Deadline:
    """Hangs up on a server that does not come to the end of its headers: each of its bytes would begin the wait for the next anew."""

    def __init__(self) -> None:
        self._sockets: list[Any] = []
        self._timer = threading.Timer(HEADER_SECONDS, self._hang_up)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def cancel(self) -> None:
        """Hear that the headers are here."""
        self._timer.cancel()

    def hear(self, event: str, info: Mapping[str, Any]) -> None:
        """Learn of a connection as soon as there is one."""
        if event in {"connection.connect_tcp.complete", "proxy.connect_tcp.complete", "connection.start_tls.complete"}:
            self._sockets.append(info["return_value"].get_extra_info("socket"))

    def _hang_up(self) -> None:
        for connection in self._sockets:
            with contextlib.suppress(OSError, ValueError):
                connection.shutdown(socket.SHUT_RDWR)


def _joined(here: str, target: str) -> str:
    try:
        there = urljoin(here, target)
        origin_of(there)
    except ValueError:
        raise WebError(f"{host_of(here)} redirects to an address that cannot be read") from None
    return there


def _limited(chunks: Iterator[bytes]) -> Iterator[bytes]:
    have = 0
    for chunk in chunks:
        have += len(chunk)
        if have > MOST_JSON:
            raise WebError("an answer is too long to be believed")
        yield chunk


def _retry_after(headers: Mapping[str, str]) -> float | None:
    said = headers.get("retry-after", "").strip()
    return min(float(said), LONGEST_DELAY) if re.fullmatch(r"\d{1,9}", said) else None
